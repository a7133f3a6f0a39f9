"""Solvers that choose a format for every matrix, and the lower bounds that prove their answers."""
