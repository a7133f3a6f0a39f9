"""What reallm needs from this machine: locks, memory, threads, devices, files of tensors and progress bars."""
