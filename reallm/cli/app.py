"""What all commands share: the application, its way of ending, and the options that several have.

A user's mistake is one line on stderr and exit code 2; Ctrl-C is one line and 130; anything unforeseen keeps its
traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from reallm.codegen.ir.operations import CodegenError
from reallm.errors import UserError
from reallm.kernels.formats.codecs import FormatError
from reallm.kernels.storage.layout import LayoutError
from reallm.planner.tables.records import RecordError
from reallm.planner.tables.units import PlanError

USER_ERRORS = (UserError, PlanError, FormatError, LayoutError, RecordError, CodegenError)
NO_SPACE = "No space left on device"
PLACE_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EDQUOT}
)
"""A path that cannot be read or written: the user's to mend."""
CONSOLE = Console()
ORDER = (
    *("measure", "plan", "diff", "explain", "report", "sweep"),
    *("compile", "eval", "generate", "finetune", "inspect", "verify", "demo"),
)
"""In which --help lists them: as they are used."""


class Commands(typer.core.TyperGroup):
    """The group of commands, with the house's way of ending."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what the user can mend becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _stop("interrupted; the same command goes on where it stopped", 130) from None
        except USER_ERRORS as error:
            raise _stop(" ".join(str(error).split()), 2) from None
        except (OSError, SafetensorError) as error:
            line = _about_place(error)
            if line is None:
                raise
            raise _stop(line, 2) from None


def _about_place(error: OSError | SafetensorError) -> str | None:
    """What to tell the user of a disk or a path that will not do; None for any other error."""
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or NO_SPACE in str(error):
        where = f" ({path})" if path else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if number in PLACE_ERRORS:
        return f"{path or 'a file'}: {os.strerror(number)}; mend that or name another place, and run the command again"
    return None


def listed(words: str) -> list[str]:
    """What an option lists, separated by commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def _stop(line: str, code: int) -> typer.Exit:
    typer.echo(f"reallm: {line}", err=True)
    return typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A folder with a transformers model, a .gguf file, or a name on the hub.")]
Artifact = Annotated[Path, typer.Argument(help="A folder that `reallm compile` made.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl or .parquet file, or a datasets name such as Salesforce/wikitext:wikitext-2-raw-v1:train. "
        "Without it, English text that every Python carries: enough to try things, too little for the best result."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything to this file as well.")]
AdapterName = Annotated[
    str | None, typer.Option(help="A LoRA or DoRA adapter of an artifact: its name in MODEL/adapters/, or a folder.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")]


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"reallm {version('reallm')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    """Fits a language model into a memory budget with the least possible loss.

    [bold]reallm measure[/bold] MODEL --text wiki.txt -o work/
    [bold]reallm plan[/bold] work/ --budget 3.0bpw -o plan.json
    [bold]reallm compile[/bold] plan.json -o out/
    [bold]reallm eval[/bold] out/ --against MODEL --text test.txt
    [bold]reallm generate[/bold] out/ "The capital of France is"

    Or all of it on a small model: [bold]reallm demo[/bold]
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("reallm").setLevel(logging.WARNING if quiet else logging.INFO)


def quiet_transformers() -> None:
    """No progress bars and no warnings of transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
