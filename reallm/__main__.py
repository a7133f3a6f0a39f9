"""`python -m reallm`, the same as the command."""

from .cli import main

main()
