"""Figures of plans and sweeps, drawn with matplotlib: as SVG within an HTML page, as an SVG file, or as PNG."""
