"""The passes over a program: one module each, with the table it needs beside it; `run.PASSES` is their order."""
