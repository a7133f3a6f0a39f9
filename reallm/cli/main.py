"""The command line: one command per stage. Each is a thin shell around the Python function of the same name."""

from __future__ import annotations

from . import artifact, compress, export, finetune, measure, plan  # each adds its own commands to the application
from .app import app

__all__ = ["app", "artifact", "compress", "export", "finetune", "main", "measure", "plan"]


def main() -> None:
    """Entry point of the `reallm` command."""
    app()


if __name__ == "__main__":
    main()
