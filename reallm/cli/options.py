"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reallm.errors import UserError

DEMO_BUDGET = "48MiB"
"""Budget of the demo for the whole weights file, embedding and head included: half of the 4-bit file it starts from."""


def file_to_write(context: typer.Context, parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Return `path`, the value of an option. Raises UserError at once if it is a folder, or lies below a file."""
    if path is None or context.resilient_parsing:
        return path
    option = parameter.opts[0]
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; expected the name of a file to write")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is a file; expected a folder")
    return path


Model = Annotated[
    str, typer.Argument(help="A folder with a transformers model, a .gguf file, or a name on the Hugging Face hub.")
]
Artifact = Annotated[Path, typer.Argument(help="A folder that `reallm compile` made.")]
PlanOrArtifact = Annotated[Path, typer.Argument(help="A plan.json, or an artifact that contains one.")]
WorkFolder = Annotated[Path, typer.Argument(help="The work folder that `reallm measure` filled.")]
MovedWork = Annotated[Path | None, typer.Option("--work", help="The work folder, if it has moved since planning.")]
Text = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl or .parquet file, or a datasets name such as Salesforce/wikitext:wikitext-2-raw-v1:train. "
        "The default is English text that comes with Python: enough to try things out, too narrow for the best result."
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .jsonl or .parquet file, or a datasets name such as Salesforce/wikitext:wikitext-2-raw-v1:train; "
        "self: text that the model writes itself, sampled at temperature 1; or python: Python's documentation. The "
        "default is English web pages (C4), streamed from the hub; without a connection it is self. Text like what the "
        "model will be used on is better.",
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write all results to this JSON file.", callback=file_to_write),
]
AdapterName = Annotated[
    str | None,
    typer.Option(help="Run with this LoRA or DoRA adapter: its name in the artifact's adapters/ folder, or a folder."),
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, or auto for a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices; the same seed gives the same result.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing artifact at the output path.")]

Budget = Annotated[
    str,
    typer.Option("--budget", "-b", help="3.0bpw for the compressed matrices, or 48MiB, 4GiB for the whole file."),
]
SpaceOption = Annotated[str, typer.Option("--space", help="Candidate formats: the name of a preset, or a YAML file.")]
Nsamples = Annotated[
    int,
    typer.Option(
        "--nsamples", min=1, help="Calibration windows. 16 take a quarter of the time but give a higher loss."
    ),
]
Seqlen = Annotated[int, typer.Option("--seqlen", min=8, help="Tokens per window.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Matrices to encode at once; -1 for one per core.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help='Texts with images, for a vision-language model: one {"image": "cat.png", "text": "A cat."} per line. '
        "Without them what only images run keeps its dtype.",
    ),
]
UseChatTemplate = Annotated[
    bool, typer.Option("--chat-template", help="Render .jsonl messages with the model's chat template.")
]


def comma_separated(words: str) -> list[str]:
    """The entries of a comma-separated option value, without blanks.

    >>> comma_separated("sm_80, sm_90")
    ['sm_80', 'sm_90']
    """
    return [word.strip() for word in words.split(",") if word.strip()]
