"""The records that reallm's commands exchange as files, the exact sizes of what these describe, and budget units."""
