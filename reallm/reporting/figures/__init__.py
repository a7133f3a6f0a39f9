"""The figures of a plan and of a sweep, drawn with matplotlib: as SVG within a page, as an SVG file, or as PNG."""
