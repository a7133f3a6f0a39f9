"""Write an artifact as a GGUF file, made from a GGUF file of the same model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from reallm.artifacts.find import require_artifact
from reallm.errors import UserError
from reallm.kernels.storage.atomic import partial_path
from reallm.targets.exported import Exported

from .contents import Contents, read_contents
from .file_header import GgufHeader, GgufTensor, read_gguf_header
from .new_header import new_header
from .types import TYPE_IDS
from .verify import verify_gguf

CHUNK_BYTES = 1 << 22


def write_gguf(artifact: Path, output: Path, base: Path, force: bool = False) -> Exported:
    """Write the artifact `artifact` as the GGUF file `output`, with exactly the weights that reallm decodes.

    Parameters
    ----------
    artifact
        Folder of an artifact whose packed matrices are in formats that `gguf_type` accepts.
    output
        The file to write. It is complete or absent.
    base
        A GGUF file of the same model, of any type. Its key-values (tokenizer, chat template, settings) are copied byte
        for byte, and so are the tensors that are not packed in the artifact.
    force
        Replace `output` if it exists.

    Raises
    ------
    UserError
        For a format or scale that GGUF cannot hold, a base of another model or with other norms or biases, an output
        that exists, and errors of the file system.

    Examples
    --------
    >>> write_gguf(Path("out"), Path("model.gguf"), base=Path("model-f16.gguf")).types["model.layers.0.mlp.up_proj"]
    'Q4_0'
    """
    _check_output(output, base, force)
    folder = require_artifact(artifact)
    header = read_gguf_header(base)
    contents = read_contents(folder, header)
    types = {name: TYPE_IDS[matrix.type_name] for name, matrix in contents.matrices.items()}
    text, tensors = new_header(header, types)
    partial = partial_path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(text)
            _write_tensors(stream, header, tensors, contents)
            stream.flush()
            os.fsync(stream.fileno())
        verify_gguf(partial, header, contents)
        nbytes = partial.stat().st_size
        partial.replace(output)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error.strerror or error}; nothing was left behind; free some space or give "
            "another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    named = {matrix.name: matrix.type_name for matrix in contents.matrices.values()}
    return Exported(output, nbytes, named, contents.notes)


def _check_output(output: Path, base: Path, force: bool) -> None:
    if output.is_dir():
        raise UserError(f"{output} is a folder; expected the name of a .gguf file to create")
    if not output.exists():
        return
    if base.exists() and output.samefile(base):
        raise UserError(f"{output} is the base itself; give another name")
    if not force:
        raise UserError(f"{output} exists; give another name, or --force to replace it")


def _write_tensors(stream: BinaryIO, base: GgufHeader, tensors: tuple[GgufTensor, ...], contents: Contents) -> None:
    """Write the data of all tensors, each followed by its padding."""
    with base.path.open("rb") as source:
        for old, new in zip(base.tensors, tensors, strict=True):
            matrix = contents.matrices.get(new.name)
            if matrix is None:
                source.seek(old.start)
                _copy(source, stream, old.nbytes)
            else:
                stream.write(matrix.blocks(contents.stored, contents.orders[new.name]).data)
            stream.write(bytes(-new.nbytes % base.alignment))


def _copy(source: BinaryIO, stream: BinaryIO, nbytes: int) -> None:
    while nbytes:
        chunk = source.read(min(nbytes, CHUNK_BYTES))
        if not chunk:
            raise UserError(f"{source.name} was cut short while it was read; copy it again")
        stream.write(chunk)
        nbytes -= len(chunk)
