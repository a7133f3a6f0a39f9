"""The decode step of a whole model as a dataflow graph, and the code made from it."""
