"""The kernel sources of an artifact."""
