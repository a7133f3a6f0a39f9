"""`reallm finetune`."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.finetuning.settings import FinetuneSettings

from .app import app, quiet_transformers
from .options import Artifact, Text, comma_separated
from .settings_options import options_from


@app.command(epilog="Example: reallm finetune out/ --text train.txt -o tuned/")
@options_from(FinetuneSettings)
def finetune(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact or adapter folder to write.")],
    settings: FinetuneSettings,
    text: Text = None,
    order: Annotated[str | None, typer.Option(hidden=True, help="The former name of --stages.")] = None,
) -> None:
    """Train an artifact towards its dense model: scales and norms, optionally factors, codebooks and new codes.

    Part of the text is held out to measure the gain; without a gain nothing is written.
    The same command continues an interrupted run: checkpoints are kept in OUTPUT.partial until it is done.
    """
    from reallm.finetuning.run import finetune as run

    if order is not None:
        stages: Any = comma_separated(order)
        settings = replace(settings, stages=stages)
    quiet_transformers()
    run(artifact, text=text, output=output, settings=settings)
    if int(os.environ.get("RANK") or 0):
        return  # only the first of several processes prints the result
    adapter = output.name if output.parent == artifact / "adapters" else output
    if settings.adapter:
        command = ["reallm", "generate", str(artifact), "--adapter", str(adapter), "TEXT"]
    else:
        command = ["reallm", "eval", str(output), "--against", "MODEL", "--text", "test.txt"]
    typer.echo(f"wrote {output}; next: {shlex.join(command)}", err=True)
