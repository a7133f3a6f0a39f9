"""Writers of Triton source."""
