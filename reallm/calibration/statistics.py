"""The calibration statistics on disk: one safetensors file per block, with the keys "<kind>/<matrix name>"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from reallm.errors import UserError
from reallm.models.matrix import Matrix
from reallm.system.tensor_file import save_tensors

OUTSIDE_BLOCKS = "outer"
KINDS = ("guided", "fisher", "row_weight", "lookup", "gram")
"""Prefixes of the keys, in the order of BlockStatistics' fields."""


@dataclass(frozen=True)
class BlockStatistics:
    """Float32 statistics of the matrices of one block, or of those outside all blocks; formulas are in `calibrate`."""

    guided: dict[str, Tensor]
    """Matrix name -> H_guided [K, K]."""
    fisher: dict[str, Tensor]
    """Matrix name -> F [N, K], the diagonal Fisher information."""
    row_weights: dict[str, Tensor]
    """Name of an output head -> weight of each row [N], with mean one."""
    lookups: dict[str, Tensor]
    """Embedding name -> diagonal Fisher information of its look-ups [N, K]."""
    grams: dict[str, Tensor]
    """Linear layer or expert -> G [N, N], the second moment of its output's gradients."""


def statistics_path(folder: Path, block: int | None) -> Path:
    """The path of the file for block number `block` or, if that is None, for the matrices outside all blocks."""
    return folder / (f"{OUTSIDE_BLOCKS}.safetensors" if block is None else f"block-{block:04d}.safetensors")


def read_statistics(folder: Path, block: int | None, matrices: Sequence[Matrix]) -> BlockStatistics:
    """Read only the statistics of `matrices`, all of which must belong to `block` (None: outside all blocks).

    Raises UserError for a file that is missing or damaged.
    """
    path = statistics_path(folder, block)
    names = {matrix.name for matrix in matrices}
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                kind, name = key.split("/", 1)
                if kind in tensors and name in names:
                    tensors[kind][name] = file.get_tensor(key).float()
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove the folder {folder} and measure again") from None
    return BlockStatistics(*tensors.values())


def statistics_keys(folder: Path, blocks: set[int | None]) -> set[str]:
    """The keys in the files of all `blocks`."""
    keys: set[str] = set()
    for block in blocks:
        with safe_open(statistics_path(folder, block), framework="pt") as file:
            keys.update(file.keys())
    return keys


def merge_statistics(folder: Path, parts: Mapping[Path, int], blocks: set[int | None]) -> None:
    """Write the statistics of several texts together to `folder`; `parts` maps their folders to numbers of tokens.

    Every statistic is a mean over tokens, so they are averaged with the numbers of tokens as weights; one that a text
    does not have counts as zero there. Counts of tokens are added up.
    """
    total = sum(parts.values())
    for block in blocks:
        merged: dict[str, Tensor] = {}
        for part, tokens in parts.items():
            path = statistics_path(part, block)
            for key, value in (load_file(path) if path.exists() else {}).items():
                share = 1.0 if key.startswith("count/") else tokens / total
                scaled = value.float() * share
                merged[key] = merged[key] + scaled.to(value.dtype) if key in merged else scaled.to(value.dtype)
        save_tensors(statistics_path(folder, block), merged)
