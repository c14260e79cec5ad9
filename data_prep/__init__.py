"""Turns each data set, in its official layout, into a prepared dataset."""
