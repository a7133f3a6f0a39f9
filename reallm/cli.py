"""The command line: one command a stage, in `commands`. Each is a thin shell around the Python function of its name."""

from __future__ import annotations

from .commands import artifacts, finetuning, measuring, planning  # each adds its own
from .commands.shell import app

__all__ = ["app", "artifacts", "finetuning", "main", "measuring", "planning"]


def main() -> None:
    """Entry point of the `reallm` command."""
    app()


if __name__ == "__main__":
    main()
