"""The passes over a program, one module per pass, and modules that they use; `run.PASSES` gives their order."""
