"""Scalar codes: one code per weight, whose levels come from a fixed table, a uniform grid or a table per row."""
