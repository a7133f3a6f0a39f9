"""E8 lattice codes (QuIP#)."""
