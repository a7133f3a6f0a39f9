"""From a plan to a typed program, and from the program to specialised kernels."""
