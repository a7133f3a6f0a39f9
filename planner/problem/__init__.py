"""The allocation problem: which matrices take part, their candidates, ties and limits."""
