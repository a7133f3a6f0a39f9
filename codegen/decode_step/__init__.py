"""The decode step of a whole model as a dataflow graph, and the code generated from it."""
