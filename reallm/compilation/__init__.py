"""Compile a plan into an artifact: a directory that transformers loads."""
