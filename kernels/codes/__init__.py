"""The codes themselves: packing, tables, trellis, lattice, neural decoder, rotations."""
