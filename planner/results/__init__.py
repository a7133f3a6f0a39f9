"""Plans, and what can be said about them: comparisons, sweeps, explanations, sums."""
