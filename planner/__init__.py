"""The optimisation: which format each matrix gets, free of torch."""
