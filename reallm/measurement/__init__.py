"""Measuring what storing each matrix in each candidate format costs."""
