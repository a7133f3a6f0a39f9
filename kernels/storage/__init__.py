"""Weights files (layout, reading, writing), element types, atomic file writing and the cache folder."""
