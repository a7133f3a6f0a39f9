"""The kernels that an artifact contains: sources, optional compiled objects, and their check."""
