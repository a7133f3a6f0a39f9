"""Additive codebooks (AQLM): a group of weights is the sum of one word from each codebook."""
