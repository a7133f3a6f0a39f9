"""Loading a model from wherever the user has it, and finding its weight matrices."""
