"""The typed operations of a matrix product, programs made of them, lowering of plans to programs, and the verifier."""
