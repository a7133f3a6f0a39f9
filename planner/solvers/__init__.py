"""Solvers of the allocation problem, and the bounds that prove their answers."""
