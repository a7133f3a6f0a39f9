"""Running generated kernels on a device."""
