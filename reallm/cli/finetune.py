"""What fine-tuning is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .app import Artifact, Force, Seed, Text, app, listed, quiet_transformers

FactorDtype = Literal["f16", "i8", "i4"]
FactorInit = Literal["zero", "loftq", "lq-lora", "plan"]
FinetuningLoss = Literal["kl", "text"]


@app.command(epilog="Example: reallm finetune out/ --text train.txt -o tuned/")
def finetune(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    text: Text = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model, if it has moved since it was measured.")] = None,
    train: Annotated[
        str,
        typer.Option(help="What: factors (more bytes); scales, norms, codebooks, embeddings (none); with commas."),
    ] = "factors,scales,norms",
    rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of factors for matrices that have none yet; default 0, for none, and 8 of an adapter."
        ),
    ] = None,
    factor_dtype: Annotated[FactorDtype, typer.Option(help="How those are stored.")] = "i8",
    init: Annotated[FactorInit, typer.Option(help="Where new factors start; plan adds none.")] = "lq-lora",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps from end to end; default 60, 160 where .3 nats or more are lost."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 1,
    seqlen: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Of factors, at its peak; it falls as a cosine.")] = 1e-3,
    gain_learning_rate: Annotated[
        float | None,
        typer.Option(help="Of scales and norms, at its peak; default: a 120th of the KL before, 5e-3 at most."),
    ] = None,
    loss: Annotated[FinetuningLoss, typer.Option(help="kl: to the dense model; text: of its next token.")] = "kl",
    patience: Annotated[
        int, typer.Option(min=0, help="End after so many evaluations without a lower held-out KL; 0: never.")
    ] = 3,
    order: Annotated[
        str, typer.Option(help="The stages in order, separated by commas: codes, blocks, end-to-end.")
    ] = "end-to-end",
    block_windows: Annotated[int, typer.Option(min=1, help="Windows that each block is trained on.")] = 64,
    block_epochs: Annotated[int, typer.Option(min=1, help="How often.")] = 2,
    code_steps: Annotated[int, typer.Option(min=0, help="Steps after each block that gets new codes.")] = 4,
    code_learning_rate: Annotated[float, typer.Option(help="Of the weights that are still to be coded.")] = 1e-4,
    work: Annotated[Path | None, typer.Option(help="The measured folder, for new codes, if it has moved.")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Less memory, more time: activations are computed, and weights decoded, again where they are needed.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run of the same settings.")] = True,
    kernels: Annotated[bool, typer.Option(help="Generate and compile GPU kernels too.")] = True,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a LoRA adapter in PEFT's form, not an artifact: factors alone.")
    ] = False,
    dora: Annotated[
        bool, typer.Option("--dora", help="With --adapter: magnitudes of rows beside the factors.")
    ] = False,
    force: Force = False,
) -> None:
    """Bring an artifact nearer to the dense model, by training its scales, norms and factors, or by new codes too.

    Resumable: checkpoints lie in OUTPUT.partial until it is done. Part of the text is held out to measure the gain.
    """
    from reallm.finetuning.run import finetune as run

    quiet_transformers()
    run(
        artifact,
        text=text,
        output=output,
        teacher=teacher,
        train=listed(train),
        order=listed(order),
        block_windows=block_windows,
        block_epochs=block_epochs,
        code_steps=code_steps,
        code_learning_rate=code_learning_rate,
        work=work,
        rank=rank,
        factor_dtype=factor_dtype,
        init=init,
        steps=steps,
        batch_size=batch_size,
        seqlen=seqlen,
        learning_rate=learning_rate,
        gain_learning_rate=gain_learning_rate,
        loss=loss,
        patience=patience,
        seed=seed,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        resume=resume,
        kernels=kernels,
        force=force,
        adapter=adapter,
        dora=dora,
    )
    named = output.name if output.parent == artifact / "adapters" else output
    if int(os.environ.get("RANK") or 0):
        return  # the first of several processes speaks for all
    after = (
        f"generate {artifact} --adapter {named} TEXT" if adapter else f"eval {output} --against MODEL --text test.txt"
    )
    typer.echo(f"wrote {output}; next: reallm {after}", err=True)
