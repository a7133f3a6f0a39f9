"""Calibration on a compressed prefix: statistics are gathered on the inputs that blocks receive in a compressed model.

GPTQ and AQLM (arXiv 2210.17323, 2401.06118) compress the blocks in order and calibrate each block on the outputs of the
compressed blocks before it. Here an earlier artifact takes the role of the compressed blocks ("prefix"): its decoded
weights replace the original ones while statistics are gathered. The weights that are then encoded are still the
original ones. Measuring, planning and compiling can be repeated, each time with the previous artifact as prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reallm.artifacts.find import require_artifact
from reallm.artifacts.manifest import MANIFEST_FILE, read_manifest, sha256_file
from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.runtime.load import load


def prefix_digest(artifact: Path, loaded: LoadedModel) -> str:
    """sha256 of the manifest of `artifact`, which contains the digests of all other files in the artifact.

    Raises UserError when the artifact was compiled from another model than `loaded`.
    """
    artifact = require_artifact(artifact)
    if read_manifest(artifact).model_sha256 != loaded.digest:
        raise UserError(
            f"--prefix {artifact} was compiled from another model than {loaded.source}; expected one of the same model"
        )
    return sha256_file(artifact / MANIFEST_FILE)


@contextmanager
def prefix_weights(artifact: Path, loaded: LoadedModel) -> Iterator[None]:
    """Within the context, replace the weights of `loaded` by the decoded weights of `artifact`; then restore them."""
    parameters = {name: loaded.model.get_parameter(name) for name in {m.parameter for m in loaded.matrices}}
    original = {name: parameter.data for name, parameter in parameters.items()}
    compressed, _ = load(artifact)
    compressed.dequantize()
    try:
        for name, parameter in parameters.items():
            parameter.data = compressed.get_parameter(name).data.to(parameter.dtype)
        del compressed
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = original[name]
