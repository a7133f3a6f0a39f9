"""Additive codebooks (AQLM)."""
