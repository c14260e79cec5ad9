"""One file for each dataset; `base` holds every field."""
