"""The kernels that an artifact contains: their sources, optional compiled objects, and a check of the sources."""
