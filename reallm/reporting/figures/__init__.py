"""The figures of a plan and of a sweep: drawn once with matplotlib, as SVG inside a page, SVG alone, or PNG."""
