"""Data sets: reading, drawing and serving them."""
