"""Access to this machine: locks, memory, threads, devices, tensor files and progress bars."""
