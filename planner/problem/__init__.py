"""The allocation problem: candidates, limits, ties."""
