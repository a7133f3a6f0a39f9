"""The portable runtime: packed fields to weights in torch, modules that hold them, and the tie to transformers."""
