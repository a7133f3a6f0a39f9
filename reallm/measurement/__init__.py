"""Measuring what each candidate format costs for each matrix."""
