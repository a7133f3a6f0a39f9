"""Encoders: they choose the codes of a matrix in a given format, so that the errors cost little. One folder per codec."""
