"""`reallm plan`, `diff`, `explain`, `report` and `sweep`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from reallm.errors import UserError
from reallm.planner.problem.plan_options import PlanOptions
from reallm.planner.tables.plan import Cost, Ties
from reallm.planner.tables.requirements import KvDtype, Requirements

from .app import CONSOLE, app, quiet_transformers
from .options import Budget, MovedWork, PlanOrArtifact, WorkFolder, file_to_write

Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", help="REGEX=FORMAT: store the matrices that match in this format. Repeatable."),
]
Excluded = Annotated[
    list[str] | None, typer.Option("--exclude", help="REGEX of matrices to keep in the model's own dtype. Repeatable.")
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="Allow only candidates that match this pattern, such as 'int4-*'. Repeatable."),
]
Preset = Annotated[
    str | None, typer.Option(help="Allow only the formats of one published method: gptq, qtip, lq-lora, ...")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="Allow only formats that this target can run: triton or cpu (reallm's own kernels), or gguf (llama.cpp), "
        "vllm, sglang or mlx, for which `reallm export` writes the file."
    ),
]
TiesOption = Annotated[
    Ties,
    typer.Option(
        "--ties",
        help="Matrices that must share one format: those with the same input (inputs), the experts of a layer "
        "(experts), or the same role in all layers (family).",
    ),
]
CostOption = Annotated[Cost, typer.Option("--cost", help="Which of the measured costs to minimise.")]


@app.command(epilog="Example: reallm plan work/ --budget 48MiB --pin 'lm_head=int8-g64' -o plan.json")
def plan(
    work: WorkFolder,
    budget: Budget,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    pin: Pins = None,
    exclude: Excluded = None,
    formats: Formats = None,
    preset: Preset = None,
    ties: TiesOption = "none",
    cost: CostOption = "two_sided",
    best: Annotated[int, typer.Option(min=1, help="Also show the N best plans, as differences from the first.")] = 1,
    refit: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rounds of measuring the plan and its rivals on the model, correcting the costs, planning again.",
        ),
    ] = 0,
    refit_text: Annotated[
        str | None,
        typer.Option("--refit-text", help="The text that --refit measures on; use one that `measure` has not seen."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", hidden=True, help="The former name of --refit-text.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1024 tokens for --refit.")] = 8,
    model: Annotated[
        str | None, typer.Option(help="The model for --refit, if it has moved since it was measured.")
    ] = None,
    refit_device: Annotated[
        str, typer.Option(help="Where --refit runs the model: cpu, cuda, cuda:1, or auto for a GPU if there is one.")
    ] = "cpu",
    target: Target = None,
    max_formats: Annotated[int | None, typer.Option(min=1, help="A maximum number of distinct formats.")] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SIZE:REGEX: a device's own memory for the matrices that match. Repeatable."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="A maximum time per decoded token, such as 20ms, by the kernels' cost model.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="The device for --latency: h100-sxm, or a JSON file of measured rates.")
    ] = None,
    context: Annotated[
        int, typer.Option(min=0, help="Reserve room in the budget for the keys and values of this many tokens.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="The number of sequences of --context tokens at once.")] = 1,
    kv_dtype: Annotated[KvDtype, typer.Option(help="The dtype of the reserved keys and values.")] = "bf16",
    adapter_rank: Annotated[
        int, typer.Option(min=0, help="Reserve room for a 16-bit adapter of this rank on every compressed linear.")
    ] = 0,
    workspace: Annotated[str | None, typer.Option(help="Reserve room for activations, such as 256MiB.")] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="The solver's time limit in seconds.")] = 60.0,
) -> None:
    """Choose a format for every matrix: the least predicted loss within a budget. Takes seconds, needs no model.

    With --refit the plan is also measured on the model: that takes minutes, and memory for two float32 copies of it.
    """
    refit_text = refit_text or text
    if refit and refit_text is None:
        raise UserError("--refit needs a text that `measure` has not seen: name one with --refit-text")
    if refit_text is not None and not refit:
        raise UserError("--refit-text is only used by --refit: add --refit 2, or leave --refit-text out")
    from reallm.planning.plan import best_plans, load_device
    from reallm.planning.plan import plan as run
    from reallm.planning.plan_file import replaced_plan

    from .plan_tables import print_changes, print_plan

    replaced = replaced_plan(output)
    result = run(
        work,
        budget=budget,
        output=output,
        pins=pin or (),
        exclude=exclude or (),
        formats=formats,
        preset=preset,
        ties=ties,
        cost=cost,
        target=target,
        requirements=Requirements(
            pools=tuple(pool or ()),
            latency=latency,
            device=None if device is None else load_device(device),
            max_formats=max_formats,
            context=context,
            batch=batch,
            kv_dtype=kv_dtype,
            adapter_rank=adapter_rank,
            workspace=workspace,
        ),
        time_limit_s=time_limit,
    )
    if refit_text is not None:
        from reallm.planning.refit import refit as run_refit

        quiet_transformers()
        result = run_refit(
            result,
            text=refit_text,
            rounds=refit,
            windows=windows,
            model=model,
            output=output,
            time_limit_s=time_limit,
            device=refit_device,
        )
    print_plan(result, CONSOLE)
    if best > 1:
        for rank, other in enumerate(
            best_plans(work, budget=budget, count=best, options=PlanOptions.of(result))[1:], 2
        ):
            print_changes(f"plan {rank} of the {best} best", result, other, CONSOLE)
    instead = "" if replaced is None else f" in place of the plan for {replaced.budget}"
    typer.echo(f"wrote {output}{instead}; next: reallm compile {shlex.quote(str(output))} -o out/", err=True)


@app.command(epilog="Example: reallm diff plan-3.0.json plan-3.5.json")
def diff(
    before: PlanOrArtifact,
    after: Annotated[Path, typer.Argument(help="Another plan.json or artifact of the same model.")],
) -> None:
    """Show what a second plan stores differently: bytes and predicted loss, matrix by matrix."""
    from reallm.artifacts.find import plan_of

    from .plan_tables import print_changes

    print_changes(f"{after} compared with {before}", plan_of(before), plan_of(after), CONSOLE, most=None)


@app.command(epilog="Example: reallm explain plan.json 'layers.0.self_attn.o_proj'")
def explain(
    plan: PlanOrArtifact,
    matrix: Annotated[
        str | None,
        typer.Argument(help="REGEX of matrices; without it, the costliest matrices and what one more MiB would buy."),
    ] = None,
    work: MovedWork = None,
) -> None:
    """Explain why a matrix got its format: bytes, loss and regret of every candidate at the plan's price per byte."""
    from reallm.artifacts.find import plan_of
    from reallm.planner.results.explain import without_format
    from reallm.planning.plan import explain as run
    from reallm.planning.plan import next_mib

    from .plan_tables import print_alternatives, print_changes, print_matrices, print_notes

    if matrix is not None:
        print_alternatives(run(plan, matrix, work=work), CONSOLE)
        for reason, names in without_format(plan_of(plan), matrix).items():
            CONSOLE.print(f"no format: {len(names)} matrices, such as {names[0]}: {reason}", markup=False)
        return
    current, richer = next_mib(plan, work=work)
    costliest = sorted(current.choices, key=lambda choice: -choice.cost)[:15]
    print_matrices(costliest, CONSOLE, "the costliest matrices")
    print_changes("what one more MiB would buy", current, richer, CONSOLE)
    print_notes(current, CONSOLE)


@app.command(epilog="Example: reallm report plan.json -o report.html --png figures/")
def report(
    plan: PlanOrArtifact,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page: one .html file.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the figures as PNG files to this folder.")] = None,
    work: MovedWork = None,
) -> None:
    """Draw a plan as one HTML file: bits per matrix, loss against size, bytes, the costliest matrices, the next MiB.

    The file is self-contained and works offline. Loss against size and the next MiB need the measured table; where it
    is missing, they are left out and a line says so. The same plan always gives the same file.
    """
    from reallm.reporting.report import report as run

    data = run(plan, output=output, work=work, png_folder=png)
    if data.lacking:
        typer.echo(data.lacking, err=True)
    typer.echo(f"wrote {output}" + (f" and the figures in {png}" if png else ""), err=True)


@app.command(epilog="Example: reallm sweep work/ --from 2bpw --to 5bpw --points 31 -o pareto.csv --figure pareto.png")
def sweep(
    work: WorkFolder,
    first: Annotated[str, typer.Option("--from", help="The first budget, in the form that `plan` takes.")] = "2bpw",
    last: Annotated[str, typer.Option("--to", help="The last budget, in the same unit.")] = "5bpw",
    points: Annotated[int, typer.Option(min=2, help="The number of evenly spaced budgets.")] = 21,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the plans as CSV.", callback=file_to_write)
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw the plans and all uniform formats: a .png, .svg or .html file.", callback=file_to_write
        ),
    ] = None,
    pin: Pins = None,
    exclude: Excluded = None,
    formats: Formats = None,
    preset: Preset = None,
    ties: TiesOption = "none",
    cost: CostOption = "two_sided",
) -> None:
    """Find the best plan at each of many budgets, beside the best uniform format."""
    from reallm.reporting.sweep import sweep as run

    from .plan_tables import print_sweep

    sweep_points = run(
        work,
        first=first,
        last=last,
        points=points,
        output=output,
        figure=figure,
        pins=pin or (),
        exclude=exclude or (),
        formats=formats,
        preset=preset,
        ties=ties,
        cost=cost,
    )
    print_sweep(sweep_points, CONSOLE)
    if missing := points - len(sweep_points):
        typer.echo(f"{missing} of {points} budgets are smaller than the smallest plan", err=True)
    for written in (output, figure):
        if written is not None:
            typer.echo(f"wrote {written}", err=True)
