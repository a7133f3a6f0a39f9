"""`reallm export`: an artifact written as the file that another engine loads.

Nothing is rounded again. The codes of the artifact are repacked into the engine's layout, which must be able to hold
their values exactly, and what was written is read back and compared with the artifact.
"""

from __future__ import annotations

from pathlib import Path

from reallm.artifacts.directory import is_artifact
from reallm.artifacts.find import require_artifact
from reallm.errors import UserError

from .engines import ENGINES
from .exported import Exported


def export(
    artifact: str | Path, output: str | Path, *, target: str, base: str | Path | None = None, force: bool = False
) -> Exported:
    """Write an artifact as the file or the folder that another engine loads.

    Parameters
    ----------
    artifact
        An artifact whose formats the engine can hold: a plan with `target` chooses only such formats.
    output
        The file ("gguf") or the folder (others) to create. It is complete or absent.
    target
        "gguf" (llama.cpp), "vllm" or "sglang" (compressed-tensors), or "mlx".
    base
        For "gguf": a GGUF file of the uncompressed model, such as the one that was compressed. Its metadata, its
        tokenizer and all tensors that are not compressed are copied.
    force
        Replace an earlier file or folder at `output`.

    Raises
    ------
    UserError
        For an unknown target, a format that the engine cannot hold, and a `base` of another model.

    Examples
    --------
    >>> reallm.export("out", "for_mlx", target="mlx")  # its plan was made without a target
    Traceback (most recent call last):
    ...
    reallm.errors.UserError: mlx cannot hold ... in ...; plan with --target mlx
    """
    if target not in ENGINES:
        raise UserError(f"--target {target}: unknown target; expected one of {', '.join(ENGINES)}")
    if (base is None) == (target == "gguf"):
        what = "needs --base FILE.gguf, a GGUF file of the same model" if base is None else "takes no --base"
        raise UserError(f"--target {target} {what}")
    folder, output = require_artifact(artifact), Path(output)
    if is_artifact(output):
        raise UserError(f"{output} is a reallm artifact, which an export does not replace; give another name")
    if target == "gguf":
        from .gguf.write import write_gguf  # the writers need torch

        assert base is not None
        return write_gguf(folder, output, Path(base), force=force)
    if target == "mlx":
        from .mlx.write import write_mlx

        return write_mlx(folder, output, force=force)
    from .compressed_tensors.write import write_compressed_tensors

    return write_compressed_tensors(folder, output, force=force, engine=target)
