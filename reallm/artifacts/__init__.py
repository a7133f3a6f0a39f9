"""The artifact directory: its files, its manifest, and the checks on both."""
