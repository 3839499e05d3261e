"""Data sets in the REFER layout: reading, drawing, warping and serving them."""
