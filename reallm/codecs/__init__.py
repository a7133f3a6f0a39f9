"""Encoders: choosing the codes of a matrix for a format, given what its errors cost. One folder per codec family."""
