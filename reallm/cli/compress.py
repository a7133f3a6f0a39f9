"""`reallm compress`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from reallm.kernels.storage.atomic import write_text_atomic

from .app import CONSOLE, app, quiet_transformers
from .options import (
    Budget,
    CalibrationText,
    Device,
    Force,
    Images,
    Jobs,
    Json,
    Model,
    Nsamples,
    Seed,
    Seqlen,
    SpaceOption,
    UseChatTemplate,
)
from .plan import CostOption, Excluded, Pins, Preset, Target, TiesOption


@app.command(epilog="Example: reallm compress HuggingFaceTB/SmolLM2-135M -b 3.0bpw --text wiki.txt -o out/")
def compress(
    model: Model,
    budget: Budget,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create for the compressed model.")],
    work: Annotated[
        Path | None,
        typer.Option(
            help="The work folder; the default is the output's name with -work. With it the next budget only costs "
            "what it needs beyond this one."
        ),
    ] = None,
    text: CalibrationText = None,
    test: Annotated[
        str | None, typer.Option(help="Held-out text to evaluate on; the same kinds of sources as --text.")
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows of --test to evaluate; 0 for none.")] = 4,
    space: SpaceOption = "default",
    nsamples: Nsamples = 64,
    seqlen: Seqlen = 1024,
    seed: Seed = 0,
    jobs: Jobs = -1,
    gap: Annotated[
        float,
        typer.Option(
            min=0, help="Encode until what was only predicted can lower the predicted loss by no more than this share."
        ),
    ] = 0.02,
    full: Annotated[bool, typer.Option("--full", help="Encode every candidate of every matrix. Slower.")] = False,
    pin: Pins = None,
    exclude: Excluded = None,
    preset: Preset = None,
    ties: TiesOption = "none",
    cost: CostOption = "two_sided",
    target: Target = None,
    images: Images = None,
    chat_template: UseChatTemplate = False,
    device: Device = "cpu",
    force: Force = False,
    json: Json = None,
) -> None:
    """Compress a model into a budget: measure, plan, compile and a short evaluation in one command.

    After an interruption the same command continues where it stopped.
    """
    from reallm.compressing.compress import compress as run
    from reallm.compressing.result import facts

    from .tables import facts_table

    quiet_transformers()
    made = run(
        model,
        budget,
        output,
        work=work,
        text=text,
        test=test,
        windows=windows,
        space=None if (preset or target) is not None and space == "default" else space,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        jobs=jobs,
        chat_template=chat_template,
        images=images,
        gap=gap,
        full=full,
        force=force,
        device=device,
        pins=pin or (),
        exclude=exclude or (),
        preset=preset,
        ties=ties,
        cost=cost,
        target=target,
    )
    if json is not None:
        write_text_atomic(json, made.to_json())
    CONSOLE.print(facts_table(str(output), facts(made)))
    for note in made.plan.notes:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
    typer.echo(f"wrote {output}; next: reallm generate {shlex.quote(str(output))} 'Once upon a time'", err=True)
