"""Perplexity, KL divergence, top-1 agreement and sizes."""
