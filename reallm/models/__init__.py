"""Loading a model from a folder, a GGUF file or the Hugging Face hub, and finding its weight matrices."""
