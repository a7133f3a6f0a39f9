"""Scalar codes: one code per weight, levels from a table or a uniform grid."""
