"""Decoding: from the packed bytes of a matrix to its weight as a torch tensor."""
