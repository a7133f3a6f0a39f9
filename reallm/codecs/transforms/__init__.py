"""Transforms applied to a matrix before it is coded: rotations, permutations, channel scales."""
