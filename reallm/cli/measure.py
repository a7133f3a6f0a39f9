"""`reallm measure`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from reallm.measurement.workers.pool import Backend

from .app import app, quiet_transformers
from .options import CalibrationText, Device, Images, Jobs, Model, Nsamples, Seed, Seqlen, SpaceOption, UseChatTemplate


@app.command(epilog="Example: reallm measure HuggingFaceTB/SmolLM2-135M --text wiki.txt -o work/")
def measure(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The work folder for the measured table, statistics and cache.")
    ],
    text: CalibrationText = None,
    space: SpaceOption = "default",
    nsamples: Nsamples = 64,
    seqlen: Seqlen = 1024,
    seed: Seed = 0,
    jobs: Jobs = -1,
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
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            help="Measure only what the best plan for this budget (3.0bpw, 48MiB) needs, and predict the rest: several "
            "times faster.",
        ),
    ] = None,
    prefix: Annotated[
        Path | None,
        typer.Option(
            help="An artifact of the same model: calibrate each block on the inputs that its weights produce."
        ),
    ] = None,
    images: Images = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            help="REGEX=FORMAT: measure the matrices that match in this format too, so that a plan can pin it. The "
            "only way to compress what the text does not run, such as a vision tower. Repeatable."
        ),
    ] = None,
    chat_template: UseChatTemplate = False,
    device: Device = "cpu",
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
        budget=budget,
        prefix=prefix,
        images=images,
        pins=pin or (),
        backend=backend,
        ray_address=ray_address,
        device=device,
    )
    base = table.base
    typer.echo(
        f"calibration {base['calibration_seconds']:.0f} s, encoding {base['measurement_seconds']:.0f} s; peak memory "
        f"{bytes_text(base['peak_rss_bytes'])}, largest encoder process {bytes_text(base['worker_peak_rss_bytes'])}",
        err=True,
    )
    typer.echo(
        f"measured; next: reallm plan {shlex.quote(str(output))} --budget {budget or '3.0bpw'} -o plan.json", err=True
    )
