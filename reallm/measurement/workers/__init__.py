"""Where encoding tasks run: this process, local processes or a Ray cluster."""
