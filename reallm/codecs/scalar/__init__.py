"""Scalar codes: one code per weight, with levels from a table, a uniform grid or a table per row."""
