"""The typer application, and what happens when a command ends.

An error that the user can correct is printed as one line on stderr and gives exit code 2; Ctrl-C gives 130; anything
unexpected keeps its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError

from reallm.errors import ReallmError

GPU_MEMORY_ERROR = "OutOfMemoryError"
NO_SPACE = "No space left on device"
PATH_ERRORS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EDQUOT),
        *(errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""Error numbers of paths that cannot be read or written, which the user can correct."""
CONSOLE = Console()
COMMAND_ORDER = (
    *("compress", "measure", "plan", "diff", "explain", "report", "sweep"),
    *("compile", "export", "eval", "generate", "finetune", "inspect", "verify", "demo"),
)
"""The order in which --help lists the commands: that in which they are used."""


class Commands(typer.core.TyperGroup):
    """The group of all commands, which turns expected errors into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands in COMMAND_ORDER."""
        return sorted(super().list_commands(ctx), key=COMMAND_ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.Exit with the code for every expected error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _exit("interrupted; the same command continues where it stopped", 130) from None
        except ReallmError as error:
            raise _exit(" ".join(str(error).split()), 2) from None
        except RuntimeError as error:
            if type(error).__name__ != GPU_MEMORY_ERROR:  # by its name: importing torch takes seconds
                raise
            raise _exit(_gpu_memory_text(str(error)), 2) from None
        except (OSError, SafetensorError) as error:
            line = _path_error_text(error)
            if line is None:
                raise
            raise _exit(line, 2) from None


def _gpu_memory_text(reason: str) -> str:
    """One line about a GPU without enough memory; torch's `reason` has several sentences."""
    what = ". ".join(" ".join(reason.split()).split(". ")[:2]).rstrip(".")
    return f"the GPU is out of memory ({what}); use a smaller --seqlen, fewer --jobs or --device cpu"


def _path_error_text(error: OSError | SafetensorError) -> str | None:
    """One line about a full disk or an unusable path; None for any other error."""
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or NO_SPACE in str(error):
        where = f" ({path})" if path else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if number in PATH_ERRORS:
        return f"{path or 'a file'}: {os.strerror(number)}; correct this or use another path, and run the command again"
    return None


def _exit(line: str, code: int) -> typer.Exit:
    typer.echo(f"reallm: {line}", err=True)
    return typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"reallm {version('reallm')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
) -> None:
    """Fit a language model into a memory budget with the least possible loss.

    [bold]reallm compress[/bold] MODEL --budget 3.0bpw --text wiki.txt -o out/

    The same in stages:

    [bold]reallm measure[/bold] MODEL --text wiki.txt -o work/
    [bold]reallm plan[/bold] work/ --budget 3.0bpw -o plan.json
    [bold]reallm compile[/bold] plan.json -o out/
    [bold]reallm eval[/bold] out/ --against MODEL --text test.txt
    [bold]reallm generate[/bold] out/ "The capital of France is"

    Or run all of it on a small model: [bold]reallm demo[/bold]
    """
    if not sys.stderr.isatty():
        # Keep progress bars of other libraries out of log files. tqdm reads this when torch imports it; our lines stay.
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("reallm").setLevel(logging.WARNING if quiet else logging.INFO)


def quiet_transformers() -> None:
    """Switch off transformers' progress bars and warnings, now or as soon as it is imported."""
    if "transformers" not in sys.modules:  # it reads these when it is imported, which a command may not need
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
