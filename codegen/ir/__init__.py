"""The typed operations of a matrix product, the program of a plan, and its verifier."""
