"""The statistics that determine the cost of an error in a weight: second moments and diagonal Fisher information."""
