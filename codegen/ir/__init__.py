"""The typed operations of a matrix product, the program of a plan, its lowering and its verifier."""
