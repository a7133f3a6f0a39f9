"""Folders for MLX."""
