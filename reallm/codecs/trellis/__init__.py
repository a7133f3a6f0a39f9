"""Trellis codes (QTIP): a tile of weights is a closed walk through a trellis."""
