"""From a measured table to a plan."""
