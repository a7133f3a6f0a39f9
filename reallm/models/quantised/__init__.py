"""Models whose weights are stored quantised by others: recognising the scheme, and unpacking it to plain floats."""
