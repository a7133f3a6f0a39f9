"""What a stored matrix is: formats, packing, reference decode and kernel templates."""
