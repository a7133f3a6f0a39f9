"""reallm."""
