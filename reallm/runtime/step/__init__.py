"""The compiled decode step: one token through the whole model in one call."""
