"""Storage formats, exact to the byte."""
