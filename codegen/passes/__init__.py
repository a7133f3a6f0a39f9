"""The passes over a program, in the order in which they run."""
