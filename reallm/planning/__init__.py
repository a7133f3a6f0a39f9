"""From a measured table to a plan: `plan`, `sweep`, `explain` and `refit`."""
