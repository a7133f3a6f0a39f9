"""Training parts of a packed matrix: attach them to a module, compute with them, write the results into its bytes."""
