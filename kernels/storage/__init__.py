"""Files of weights: their layout, reading and writing."""
