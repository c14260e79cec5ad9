"""Data: NIfTI files, the preprocessing recipe, the prepared dataset and its batches."""
