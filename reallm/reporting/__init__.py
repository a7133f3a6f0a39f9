"""A plan as one HTML page or a figure."""
