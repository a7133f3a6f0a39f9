"""Neural codes (ReALLM): a decoder network shared by a family of matrices turns codes into weights."""
