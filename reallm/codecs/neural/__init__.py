"""Neural codes (ReALLM): a decoder network, shared by all matrices of a family, turns codes into weights."""
