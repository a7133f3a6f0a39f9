"""`reallm measure`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from reallm.measurement.workers.pool import Backend

from .app import app, quiet_transformers
from .options import Model, Seed, Text


@app.command(epilog="Example: reallm measure HuggingFaceTB/SmolLM2-135M --text wiki.txt -o work/")
def measure(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The work folder for the measured table, statistics and cache.")
    ],
    text: Text = None,
    space: Annotated[str, typer.Option(help="Candidate formats: the name of a preset, or a YAML file.")] = "default",
    nsamples: Annotated[
        int, typer.Option(min=1, help="Calibration windows. 16 take a quarter of the time but give a higher loss.")
    ] = 64,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 1024,
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option(help="Matrices to encode at once; -1 for one per core.")] = -1,
    backend: Annotated[
        Backend, typer.Option(help="Encode in processes of this machine, or on a Ray cluster.")
    ] = "processes",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the Ray cluster. The default is RAY_ADDRESS, or the cluster of this machine. "
            "All its machines must see the output folder under the same path."
        ),
    ] = None,
    bpw: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="MIN MAX bits per weight that you will plan for; skips candidates that cannot matter in between."
        ),
    ] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(
            help="An artifact of the same model: calibrate each block on the inputs that its weights produce."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help='Texts with images, for a vision-language model: one {"image": "cat.png", "text": "A cat."} per line. '
            "Without them what only images run keeps its dtype."
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX=FORMAT: measure the matrices that match in this format too, so that a plan can pin it. The "
            "only way to compress what the text does not run, such as a vision tower. Repeatable."
        ),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Render .jsonl messages with the model's chat template.")
    ] = False,
) -> None:
    """Measure what storing each matrix in each candidate format would cost.

    Finished work is cached in the output folder: after an interruption the same command continues where it stopped.
    """
    from reallm.measurement.measure import measure as run
    from reallm.planner.tables.units import bytes_text

    quiet_transformers()
    table = run(
        model,
        text=text,
        output=output,
        space=space,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        jobs=jobs,
        chat_template=chat_template,
        bpw=bpw,
        prefix=prefix,
        images=images,
        pins=pin or (),
        backend=backend,
        ray_address=ray_address,
    )
    base = table.base
    typer.echo(
        f"calibration {base['calibration_seconds']:.0f} s, encoding {base['measurement_seconds']:.0f} s; peak memory "
        f"{bytes_text(base['peak_rss_bytes'])}, largest encoder process {bytes_text(base['worker_peak_rss_bytes'])}",
        err=True,
    )
    typer.echo(f"measured; next: reallm plan {shlex.quote(str(output))} --budget 3.0bpw -o plan.json", err=True)
