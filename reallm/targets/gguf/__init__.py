"""GGUF files for llama.cpp and the engines built on it."""
