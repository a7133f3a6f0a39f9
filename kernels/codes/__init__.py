"""The values that codes represent, in numpy: packing, level tables, trellis, lattice, neural decoder, rotations."""
