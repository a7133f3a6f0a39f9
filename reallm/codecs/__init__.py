"""Encoders: they choose the codes of a matrix in a given format so that errors cost little. One folder per codec."""
