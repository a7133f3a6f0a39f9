"""Packed bytes to torch weights."""
