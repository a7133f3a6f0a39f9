"""Plans: made, compared, explained, drawn, swept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reallm.errors import UserError
from reallm.planner.problem.candidates import PlanOptions
from reallm.planner.tables.plan import Cost, Ties
from reallm.planner.tables.records import write_record
from reallm.planner.tables.requirements import KvDtype, Requirements

from .app import CONSOLE, app, quiet_transformers


@app.command(epilog="Example: reallm plan work/ --budget 48MiB --pin 'lm_head=int8-g64' -o plan.json")
def plan(
    work: Annotated[Path, typer.Argument(help="The folder that `reallm measure` filled.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="3.0bpw of the matrices, or 48MiB, 4GiB of the file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.json"),
    pin: Annotated[list[str] | None, typer.Option(help="REGEX=FORMAT for the matrices it finds; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="REGEX of matrices to leave as they are.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="Candidates allowed, such as 'int4-*'.")] = None,
    preset: Annotated[str | None, typer.Option(help="Only the formats of one method: gptq, qtip, lq-lora, ...")] = None,
    ties: Annotated[Ties, typer.Option(help="Matrices that must get one format.")] = "none",
    cost: Annotated[Cost, typer.Option(help="The measured cost to minimise.")] = "two_sided",
    best: Annotated[int, typer.Option(min=1, help="Also show so many of the best plans, as changes to it.")] = 1,
    refit: Annotated[
        int, typer.Option(min=0, help="Rounds of measuring the plan and its rivals, correcting and planning again.")
    ] = 0,
    text: Annotated[str | None, typer.Option(help="What --refit measures on: text that measure has not seen.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of it, of 1024 tokens.")] = 8,
    target: Annotated[str | None, typer.Option(help="Only formats it has kernels for: triton or cpu.")] = None,
    max_formats: Annotated[int | None, typer.Option(min=1, help="At most so many formats in use.")] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="NAME=SIZE:REGEX, a device's memory for the matrices it finds; repeatable.")
    ] = None,
    latency: Annotated[str | None, typer.Option(help="Most time of a token's decoding, such as 20ms.")] = None,
    device: Annotated[str | None, typer.Option(help="For --latency: h100-sxm, or a JSON file of rates.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Room in the budget for keys and values of these tokens,")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="of so many sequences at once,")] = 1,
    kv_dtype: Annotated[KvDtype, typer.Option(help="each number in this type;")] = "bf16",
    adapter_rank: Annotated[int, typer.Option(min=0, help="for 16-bit adapters of this rank beside the weights;")] = 0,
    workspace: Annotated[str | None, typer.Option(help="and for activations, such as 256MiB.")] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for the solver.")] = 60.0,
) -> None:
    """Choose every matrix's format: the least predicted loss within a budget. Seconds; needs no model.

    With --refit the plan is measured on the model too: minutes, and two copies of it in float32.
    """
    if refit and text is None:
        raise UserError("--refit measures on a text that measure has not seen: name one with --text")
    if text is not None and not refit:
        raise UserError("--text is what --refit measures on: give --refit 2 too, or leave it out")
    from reallm.planning.plan import best_plans
    from reallm.planning.plan import device as named_device
    from reallm.planning.plan import plan as run

    from .tables import print_changes, print_plan

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
            device=None if device is None else named_device(device),
            max_formats=max_formats,
            context=context,
            batch=batch,
            kv_dtype=kv_dtype,
            adapter_rank=adapter_rank,
            workspace=workspace,
        ),
        time_limit_s=time_limit,
    )
    if refit:
        from reallm.planning.refit import refit as run_refit

        quiet_transformers()
        assert text is not None
        result = run_refit(result, text=text, rounds=refit, windows=windows, time_limit_s=time_limit)
        write_record(output, result)
    print_plan(result, CONSOLE)
    if best > 1:
        for rank, other in enumerate(
            best_plans(work, budget=budget, count=best, plan_options=PlanOptions.of(result))[1:], 2
        ):
            print_changes(f"plan {rank} of the best", result, other, CONSOLE)
    typer.echo(f"wrote {output}; next: reallm compile {output} -o out/", err=True)


@app.command(epilog="Example: reallm diff plan-3.0.json plan-3.5.json")
def diff(
    before: Annotated[Path, typer.Argument(help="A plan.json, or an artifact.")],
    after: Annotated[Path, typer.Argument(help="Another, of the same model.")],
) -> None:
    """What a second plan stores differently: bytes and predicted loss, matrix by matrix."""
    from reallm.planning.plan import read_plan

    from .tables import print_changes

    print_changes(f"{after} beside {before}", read_plan(before), read_plan(after), CONSOLE, most=None)


@app.command(epilog="Example: reallm explain plan.json 'layers.0.self_attn.o_proj'")
def explain(
    plan: Annotated[Path, typer.Argument(help="A plan.json, or an artifact.")],
    matrix: Annotated[
        str | None, typer.Argument(help="REGEX of matrices; without it, the dearest and what a MiB more would buy.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="The measured folder, if it has moved.")] = None,
) -> None:
    """Why a matrix got its format: every candidate's bytes and loss, and its regret at the plan's price of a byte."""
    from reallm.planning.plan import explain as run
    from reallm.planning.plan import next_mib

    from .tables import alternatives_table, matrices_table, print_changes

    if matrix is not None:
        CONSOLE.print(alternatives_table(run(plan, matrix, work=work)))
        return
    chosen, richer = next_mib(plan, work=work)
    CONSOLE.print(matrices_table(sorted(chosen.choices, key=lambda choice: -choice.cost)[:15], "the dearest matrices"))
    print_changes("what a MiB more would buy", chosen, richer, CONSOLE)


@app.command(epilog="Example: reallm report plan.json -o report.html --png figures/")
def report(
    plan: Annotated[Path, typer.Argument(help="A plan.json, or an artifact.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page, one .html file.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="A folder for the figures as PNG too.")] = None,
    work: Annotated[Path | None, typer.Option(help="The measured folder, if it has moved.")] = None,
) -> None:
    """Draw a plan as one HTML file: bits of every matrix, loss against size, bytes, the dearest matrices, the next MiB.

    The file needs nothing beside it and no network. What is drawn from the measured table (loss against size, the next
    MiB) is left out, and said, where the table is gone. The same plan gives the same file.
    """
    from reallm.reporting.report import report as run

    findings = run(plan, output=output, work=work, png_folder=png)
    if findings.lacking:
        typer.echo(findings.lacking, err=True)
    typer.echo(f"wrote {output}" + (f" and the figures in {png}" if png else ""), err=True)


@app.command(epilog="Example: reallm sweep work/ --from 2bpw --to 5bpw --points 31 -o pareto.csv --figure pareto.png")
def sweep(
    work: Annotated[Path, typer.Argument(help="The folder that `reallm measure` filled.")],
    first: Annotated[str, typer.Option("--from", help="The first budget, as for plan.")] = "2bpw",
    last: Annotated[str, typer.Option("--to", help="The last, in the same unit.")] = "5bpw",
    points: Annotated[int, typer.Option(min=2, help="How many, evenly spaced.")] = 21,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write them as CSV too.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw them and every single format: .png, .svg, .html.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="As for plan.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="As for plan.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="As for plan.")] = None,
    preset: Annotated[str | None, typer.Option(help="As for plan.")] = None,
    ties: Annotated[Ties, typer.Option(help="As for plan.")] = "none",
    cost: Annotated[Cost, typer.Option(help="As for plan.")] = "two_sided",
) -> None:
    """What every size would cost: the best plan at each of many budgets, beside the best single format."""
    from reallm.planning.plan import sweep as run

    from .tables import print_sweep

    found = run(
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
    print_sweep(found, CONSOLE)
    if missing := points - len(found):
        typer.echo(f"{missing} of {points} budgets are smaller than any plan", err=True)
    for written in (output, figure):
        if written is not None:
            typer.echo(f"wrote {written}", err=True)
