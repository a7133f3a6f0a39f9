"""Codes for a neural decoder that a family of matrices shares (ReALLM)."""
