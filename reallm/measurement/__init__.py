"""Measuring how much loss and how many bytes each matrix costs in each candidate format."""
