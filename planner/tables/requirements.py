"""What a plan must keep beside its budget, as a deployment asks for it.

pools          "gpu0=4GiB:layers\\.([0-9]|1[0-4])\\."   bytes of the matrices whose names the regex finds
latency        "20ms" of a token's decoding, on a `Device`, by the kernels' cost model
max_formats    how many formats may be in use at once
context, batch, kv_dtype, adapter_rank, workspace      what shares the budget's memory with the weights
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from reallm.kernels.formats.codecs import FLOAT_NBYTES
from reallm.planner.problem.latency import Device

from .measured_table import CacheLayer, MatrixRecord, MeasuredTable
from .records import Record
from .units import PlanError, parse_bytes

KvDtype = Literal["f32", "bf16", "f16", "i8"]
ADAPTER_NBYTES = 2


class Requirements(Record):
    """What is asked beside the budget; by default nothing."""

    pools: tuple[str, ...] = ()
    latency: str | None = None
    device: Device | None = None
    max_formats: int | None = Field(default=None, gt=0)
    context: int = Field(default=0, ge=0)
    """Tokens of a sequence whose keys and values must fit too."""
    batch: int = Field(default=1, gt=0)
    """Sequences at once."""
    kv_dtype: KvDtype = "bf16"
    adapter_rank: int = Field(default=0, ge=0)
    """Rank of 16-bit adapters on every matrix of the blocks, trained or switched at load."""
    workspace: str | None = None
    """Bytes for activations and the runtime, such as "256MiB"."""


class Reserved(Record):
    """Bytes that the budget pays for beside the weights."""

    kv_cache_bytes: int = Field(default=0, ge=0)
    adapter_bytes: int = Field(default=0, ge=0)
    workspace_bytes: int = Field(default=0, ge=0)

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.kv_cache_bytes + self.adapter_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """Memory of one device: the matrices whose names `regex` finds lie in it."""

    name: str
    nbytes: int
    regex: re.Pattern[str]

    def holds(self, name: str) -> bool:
        """Whether the matrix or tensor called `name` lies in it."""
        return self.regex.search(name) is not None


def parse_pool(text: str) -> Pool:
    """Read "name=size:regex". Raises PlanError."""
    match = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)\s*=\s*([^:]+):(.+)", text)
    if match is None:
        raise PlanError(rf"--pool {text!r}: expected NAME=SIZE:REGEX, such as 'gpu0=4GiB:layers\.[0-9]\.'")
    try:
        regex = re.compile(match[3])
    except re.error as error:
        raise PlanError(f"--pool {text!r}: {match[3]!r} is no regular expression: {error}") from None
    return Pool(match[1], parse_bytes(match[2].strip(), f"--pool {text!r}"), regex)


def cache_bytes(layers: tuple[CacheLayer, ...], asked: Requirements) -> int:
    """Keys and values of `batch` sequences of `context` tokens, each layer's no more than its window."""
    kept = sum(layer.values * min(asked.context, layer.window or asked.context) for layer in layers)
    return kept * asked.batch * FLOAT_NBYTES[asked.kv_dtype]


def reserved(table: MeasuredTable, asked: Requirements) -> Reserved:
    """What the budget pays for beside the weights. Raises PlanError for a model whose cache was not measured."""
    if asked.context and not table.kv_cache:
        raise PlanError(
            f"--context {asked.context}: the table knows no cache of keys and values of {table.model}; measured by an "
            "earlier version, run `reallm measure` again (nothing is encoded twice); else the model keeps none"
        )
    return Reserved(
        kv_cache_bytes=cache_bytes(table.kv_cache, asked),
        adapter_bytes=sum(_adapter_bytes(matrix, asked.adapter_rank) for matrix in table.matrices),
        workspace_bytes=parse_bytes(asked.workspace, "--workspace") if asked.workspace else 0,
    )


def _adapter_bytes(matrix: MatrixRecord, rank: int) -> int:
    return rank * (matrix.rows + matrix.cols) * ADAPTER_NBYTES if matrix.kind in ("linear", "expert") else 0
