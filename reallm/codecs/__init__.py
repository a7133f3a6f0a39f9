"""Encoders: how the codes of a matrix are chosen for a format, given what errors cost."""
