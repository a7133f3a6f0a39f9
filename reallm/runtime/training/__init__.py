"""Train parts of a packed matrix: start, compute products meanwhile, and write the results into its fields."""
