"""Trellis codes (QTIP): the codes of a tile of weights are a closed walk through a trellis."""
