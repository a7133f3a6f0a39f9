"""Perplexity of a model, and how far its predictions diverge from another model's."""
