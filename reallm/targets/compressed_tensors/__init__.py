"""Folders in the compressed-tensors format, for vLLM, SGLang and transformers."""
