"""What a deployment needs besides the budget: limits on a plan, and memory that is set aside within the budget.

pools          "gpu0=4GiB:layers\\.([0-9]|1[0-4])\\."   bytes on one device, for the matrices that the regex matches
latency        "20ms" to decode one token on a `Device`, by the cost model of the kernels
max_formats    maximum number of different formats
context, batch, kv_dtype, adapter_rank, workspace      other memory that must fit into the budget with the weights
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from reallm.kernels.storage.dtypes import DTYPES

from .device import Device
from .measured_table import CacheLayer, MatrixRecord, MeasuredTable
from .records import Record
from .units import PlanError, parse_bytes

KvDtype = Literal["f32", "bf16", "f16", "i8"]
ADAPTER_NBYTES = 2
"""Adapters are stored in 16 bits."""


class Requirements(Record):
    """The limits that a plan must meet besides its budget; by default there are none.

    >>> roomy = reallm.Requirements(max_formats=1)
    >>> plan = reallm.plan("work", budget="5bpw", requirements=roomy)
    >>> len({choice.format for choice in plan.choices})
    1
    """

    pools: tuple[str, ...] = ()
    """"NAME=SIZE:REGEX": the matrices and tensors whose names the regex matches must fit into SIZE on device NAME."""
    latency: str | None = None
    """Longest time to decode one token of one sequence, such as "20ms". Needs `device`."""
    device: Device | None = None
    """The device whose rates the latency is computed with."""
    max_formats: int | None = Field(default=None, gt=0)
    """Maximum number of different formats in use; None for any number."""
    context: int = Field(default=0, ge=0)
    """Tokens per sequence whose keys and values must fit into the budget too."""
    batch: int = Field(default=1, gt=0)
    """Number of sequences that are decoded at once, each with a KV cache."""
    kv_dtype: KvDtype = "bf16"
    """Type of each number in the KV cache."""
    adapter_rank: int = Field(default=0, ge=0)
    """Rank of 16-bit adapters on every matrix of the blocks, which must fit into the budget too; 0 for no adapters."""
    workspace: str | None = None
    """Memory of the budget to leave free for activations and the runtime, such as "256MiB"."""


class Reserved(Record):
    """Bytes of the budget that are set aside and cannot hold weights."""

    kv_cache_bytes: int = Field(default=0, ge=0)
    adapter_bytes: int = Field(default=0, ge=0)
    workspace_bytes: int = Field(default=0, ge=0)

    @property
    def nbytes(self) -> int:
        """The sum of the three, in bytes."""
        return self.kv_cache_bytes + self.adapter_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True)
class Pool:
    """The memory of one device, which holds the matrices whose names `regex` matches."""

    name: str
    nbytes: int
    regex: re.Pattern[str]

    def holds(self, name: str) -> bool:
        """Whether the matrix or tensor called `name` is on this device."""
        return self.regex.search(name) is not None


def parse_pool(text: str) -> Pool:
    """Parse "NAME=SIZE:REGEX". Raises PlanError."""
    match = re.fullmatch(r"\s*([A-Za-z0-9_.-]+)\s*=\s*([^:]+):(.+)", text)
    if match is None:
        raise PlanError(rf"--pool {text!r}: expected NAME=SIZE:REGEX, such as 'gpu0=4GiB:layers\.[0-9]\.'")
    try:
        regex = re.compile(match[3])
    except re.error as error:
        raise PlanError(f"--pool {text!r}: {match[3]!r} is not a regular expression: {error}") from None
    return Pool(match[1], parse_bytes(match[2].strip(), f"--pool {text!r}"), regex)


def cache_bytes(layers: tuple[CacheLayer, ...], requirements: Requirements) -> int:
    """Bytes of the KV cache for `batch` sequences of `context` tokens; a layer keeps at most its window of tokens."""
    context = requirements.context
    numbers = sum(layer.values * min(context, layer.window or context) for layer in layers)
    return DTYPES[requirements.kv_dtype].nbytes(numbers * requirements.batch)


def reserved_memory(table: MeasuredTable, requirements: Requirements) -> Reserved:
    """Bytes that the requirements set aside within the budget. Raises PlanError for a table without a KV cache size."""
    if requirements.context and not table.kv_cache:
        raise PlanError(
            f"--context {requirements.context}: this table has no KV-cache measurement for {table.model}. If an "
            "earlier version made it, run `reallm measure` again (nothing is encoded twice). Otherwise the model has "
            "no KV cache: leave --context out"
        )
    return Reserved(
        kv_cache_bytes=cache_bytes(table.kv_cache, requirements),
        adapter_bytes=sum(_adapter_bytes(matrix, requirements.adapter_rank) for matrix in table.matrices),
        workspace_bytes=parse_bytes(requirements.workspace, "--workspace") if requirements.workspace else 0,
    )


def _adapter_bytes(matrix: MatrixRecord, rank: int) -> int:
    return rank * (matrix.rows + matrix.cols) * ADAPTER_NBYTES if matrix.kind in ("linear", "expert") else 0
