"""Running an artifact: packed modules, products on CPU and GPU, the tie to transformers."""
