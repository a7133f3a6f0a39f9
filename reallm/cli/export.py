"""`reallm export`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from .app import CONSOLE, app, quiet_transformers
from .options import Artifact


@app.command(epilog="Example: reallm export out/ --target gguf --base model.gguf -o small.gguf")
def export(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (gguf) or the folder (others) to create.")],
    target: Annotated[str, typer.Option(help="gguf (llama.cpp, Ollama, LM Studio), vllm, sglang or mlx.")],
    base: Annotated[
        Path | None,
        typer.Option(help="For gguf: a GGUF file of the same model; its metadata and tokenizer are copied."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier file or folder at the output.")] = False,
) -> None:
    """Write an artifact as the file that llama.cpp, vLLM, SGLang or MLX loads, without rounding anything again.

    The artifact's plan must use formats that the engine holds: compress or plan with the same --target.
    """
    from reallm.planner.tables.units import bytes_text
    from reallm.targets.export import export as run

    from .tables import facts_table

    quiet_transformers()
    made = run(artifact, output, target=target, base=base, force=force)
    types = Counter(made.types.values())
    listed = ", ".join(f"{count} x {name}" for name, count in sorted(types.items()))
    CONSOLE.print(facts_table(str(output), [("weights files", bytes_text(made.nbytes)), ("matrices", listed)]))
    for note in made.notes:
        CONSOLE.print(f"note: {note}", highlight=False, markup=False)
