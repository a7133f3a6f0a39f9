"""What measuring a model is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reallm.measurement.workers.pool import Backend

from .app import Model, Seed, Text, app, quiet_transformers


@app.command(epilog="Example: reallm measure HuggingFaceTB/SmolLM2-135M --text wiki.txt -o work/")
def measure(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, statistics and cache.")],
    text: Text = None,
    space: Annotated[str, typer.Option(help="Candidate formats: a preset, or a YAML file.")] = "default",
    nsamples: Annotated[
        int, typer.Option(min=1, help="Calibration windows; 16 take a quarter of the time, and lose more.")
    ] = 64,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 1024,
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option(help="Matrices encoded at once; -1 for every core.")] = -1,
    backend: Annotated[
        Backend, typer.Option(help="What encodes them: processes of this machine, or a Ray cluster.")
    ] = "processes",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the cluster; else RAY_ADDRESS, or the cluster this machine belongs to. All its machines "
            "must see the output folder under the same path."
        ),
    ] = None,
    bpw: Annotated[
        tuple[float, float] | None,
        typer.Option(help="LEAST MOST bits per weight to plan for; leaves out candidates that cannot matter there."),
    ] = None,
    prefix: Annotated[
        Path | None, typer.Option(help="An artifact of the model: calibrate on the inputs its weights give each block.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Wrap .jsonl messages as the model does.")
    ] = False,
) -> None:
    """Measure what storing every matrix in every candidate format would cost.

    Resumable: what is done is cached in the output folder, and the same command goes on where it stopped.
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
        backend=backend,
        ray_address=ray_address,
    )
    base = table.base
    typer.echo(
        f"calibration {base['calibration_seconds']:.0f} s, encoding {base['measurement_seconds']:.0f} s; peak memory "
        f"{bytes_text(base['peak_rss_bytes'])}, of the largest encoder {bytes_text(base['worker_peak_rss_bytes'])}",
        err=True,
    )
    typer.echo(f"measured; next: reallm plan {output} --budget 3.0bpw -o plan.json", err=True)
