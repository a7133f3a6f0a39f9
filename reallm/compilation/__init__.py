"""From a plan to an artifact: a directory that transformers loads."""
