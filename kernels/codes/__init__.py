"""What codes stand for, in numpy: packing, level tables, trellis, lattice, neural decoder, rotations."""
