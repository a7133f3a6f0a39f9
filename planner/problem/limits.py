"""The limits of a problem, from what was asked: what each candidate uses of them, and what is left for candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import TensorSpec
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.requirements import Pool, Requirements, cache_bytes, parse_pool
from reallm.planner.tables.units import PlanError, parse_nanoseconds

from .problem import Limit
from .tensor_layout import FLOAT_TENSOR, stack_of


class LimitCost(ABC):
    """One limit, before the problem: how matrices and the rest of the model use it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What errors and plans call it."""

    @abstractmethod
    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        """What a matrix of `nbytes` bytes in `fmt` uses."""

    @abstractmethod
    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        """The limit for candidates: without what the matrices `fixed` and all other tensors use."""


@dataclass(frozen=True)
class PoolMeter(LimitCost):
    """Bytes of one device. A shared codebook is charged to every pool, wherever its users lie: never too little."""

    pool: Pool
    table: MeasuredTable
    asked: Requirements

    @property
    def name(self) -> str:
        return f"pool {self.pool.name}"

    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        return nbytes if self.pool.holds(matrix.name) else 0

    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        taken = sum(self.use(*each) for each in fixed)
        dtype = FLOAT_TENSOR[self.table.dtype]
        others = [TensorSpec(n, dtype, tuple(s)) for n, s in self.table.other_tensors.items() if self.pool.holds(n)]
        blocks = {m.block for m in self.table.matrices if m.block is not None and self.pool.holds(m.name)}
        layers = tuple(layer for n, layer in enumerate(self.table.kv_cache) if n in blocks)
        taken += sum(spec.nbytes for spec in others) + cache_bytes(layers, self.asked)
        return Limit(self.name, "bytes", self.pool.nbytes - taken, shared)


@dataclass(frozen=True)
class LatencyMeter(LimitCost):
    """Nanoseconds of one token; an embedding that is no head costs nothing, an expert its share of tokens."""

    nanoseconds: int
    table: MeasuredTable
    asked: Requirements
    experts: Mapping[str, int]
    """Stack -> how many experts it has."""

    @property
    def name(self) -> str:
        return "latency"

    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        device = self.asked.device
        assert device is not None
        if matrix.kind == "embedding" and not matrix.input:
            return 0
        time, stack = device.nanoseconds(fmt, matrix.numel, nbytes), stack_of(matrix)
        if stack is None or self.table.experts_per_token is None:
            return time
        experts = self.experts[stack]
        return -(-time * min(self.table.experts_per_token, experts) // experts)

    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        device = self.asked.device
        assert device is not None
        dtype = FLOAT_TENSOR[self.table.dtype]
        others = sum(TensorSpec(n, dtype, tuple(s)).nbytes for n, s in self.table.other_tensors.items())
        taken = device.reading(others + cache_bytes(self.table.kv_cache, self.asked))
        taken += sum(self.use(*each) for each in fixed)
        return Limit(self.name, "ns", self.nanoseconds - taken)


def meters(table: MeasuredTable, asked: Requirements) -> tuple[LimitCost, ...]:
    """A meter for every limit asked for. Raises PlanError for what cannot be read or finds nothing."""
    found: list[LimitCost] = []
    for text in asked.pools:
        pool = parse_pool(text)
        if not any(pool.holds(matrix.name) for matrix in table.matrices):
            raise PlanError(f"--pool {text!r} finds none of the {len(table.matrices)} matrices")
        found.append(PoolMeter(pool, table, asked))
    if len({meter.name for meter in found}) != len(found):
        raise PlanError("two pools have the same name")
    if asked.latency is not None:
        if asked.device is None:
            raise PlanError(f"--latency {asked.latency} needs the device to decode on: give --device too")
        found.append(LatencyMeter(parse_nanoseconds(asked.latency, "--latency"), table, asked, _experts(table)))
    return tuple(found)


def _experts(table: MeasuredTable) -> Mapping[str, int]:
    return Counter(stack for matrix in table.matrices if (stack := stack_of(matrix)) is not None)
