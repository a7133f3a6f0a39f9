"""The statistics that say what an error in a weight costs: second moments and the diagonal Fisher information."""
