"""E8 lattice codes (QuIP#): a group of eight weights is one word of the E8P codebook."""
