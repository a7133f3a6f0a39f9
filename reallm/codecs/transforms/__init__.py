"""Transforms of a matrix before it is coded: channel scales, a permutation of the columns, rotations."""
