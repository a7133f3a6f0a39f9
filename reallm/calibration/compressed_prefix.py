"""Calibration on the compressed prefix: every block sees the inputs that an already compressed model gives it.

GPTQ and AQLM (arXiv 2210.17323, 2401.06118) compress block after block, each calibrated on the outputs of those before
it. Here the prefix is an artifact made earlier: its decoded weights stand in for the model's own while statistics are
gathered; what is coded stays the original weight. One more round of measure, plan and compile is one such pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from reallm.artifacts.manifest import MANIFEST_FILE, read_manifest, sha256_file
from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.runtime.load import load
from reallm.runtime.modules import ExpertStack


def prefix_digest(artifact: Path, loaded: LoadedModel) -> str:
    """sha256 of the artifact's manifest, which holds those of all its bytes. UserError for another model's artifact."""
    made_from = read_manifest(artifact).model_sha256
    if made_from != loaded.digest:
        raise UserError(f"--prefix {artifact} was compiled from another model than {loaded.source}")
    return sha256_file(artifact / MANIFEST_FILE)


@contextmanager
def weights_of(artifact: Path, loaded: LoadedModel) -> Iterator[None]:
    """Within it the matrices of `loaded` have the decoded weights of `artifact`."""
    parameters = {name: loaded.model.get_parameter(name) for name in {m.parameter for m in loaded.matrices}}
    before = {name: parameter.data for name, parameter in parameters.items()}
    compressed, _ = load(artifact)
    try:
        for name, parameter in parameters.items():
            path, _, attribute = name.rpartition(".")
            parameter.data = _decoded(getattr(compressed.get_submodule(path), attribute)).to(parameter.dtype)
        del compressed
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def _decoded(weight: Tensor | ExpertStack) -> Tensor:
    return weight.dense() if isinstance(weight, ExpertStack) else weight.detach().as_subclass(Tensor).clone()
