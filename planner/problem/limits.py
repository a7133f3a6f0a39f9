"""The limits of a plan besides its budget: how much each matrix uses of them, and what is left for candidates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reallm.kernels.formats.formats import Format
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable
from reallm.planner.tables.requirements import Pool, Requirements, cache_bytes, parse_pool
from reallm.planner.tables.tensor_layout import other_specs, stack_of
from reallm.planner.tables.units import PlanError, parse_nanoseconds

from .problem import Limit


class LimitCost(ABC):
    """One limit: how much of it each matrix uses in each format, and how much the rest of the model uses."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The limit's name in errors and plans."""

    @abstractmethod
    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        """How much of the limit `matrix` uses if it is stored in `fmt` with `nbytes` bytes."""

    @abstractmethod
    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        """The limit that remains for candidates.

        `fixed` are the matrices that take no part, with format and bytes; they and all other tensors are subtracted
        from the capacity. `shared` maps the key of each shared codebook to its bytes.
        """


@dataclass(frozen=True)
class PoolCost(LimitCost):
    """Bytes on one device.

    A shared codebook is charged to every pool, wherever its matrices are, so what a pool uses is never underestimated.
    """

    pool: Pool
    table: MeasuredTable
    requirements: Requirements

    @property
    def name(self) -> str:
        return f"pool {self.pool.name}"

    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        return nbytes if self.pool.holds(matrix.name) else 0

    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        fixed_use = sum(self.use(*each) for each in fixed)
        specs = other_specs(self.table.other_tensors, self.table.other_dtypes, self.table.dtype)
        others = [spec for spec in specs if self.pool.holds(spec.name)]
        blocks = {m.block for m in self.table.matrices if m.block is not None and self.pool.holds(m.name)}
        layers = tuple(layer for n, layer in enumerate(self.table.kv_cache) if n in blocks)
        fixed_use += sum(spec.nbytes for spec in others) + cache_bytes(layers, self.requirements)
        return Limit(self.name, "bytes", self.pool.nbytes - fixed_use, shared)


@dataclass(frozen=True)
class LatencyCost(LimitCost):
    """Nanoseconds to decode one token.

    An embedding that is not also the head takes no time. That of an expert is multiplied by the share of tokens
    that are routed to it.
    """

    nanoseconds: int
    table: MeasuredTable
    requirements: Requirements
    experts: Mapping[str, int]
    """Stack -> number of experts in it."""

    @property
    def name(self) -> str:
        return "latency"

    def use(self, matrix: MatrixRecord, fmt: Format, nbytes: int) -> int:
        device = self.requirements.device
        assert device is not None
        if matrix.kind == "embedding" and not matrix.input:
            return 0
        time, stack = device.nanoseconds(fmt, matrix.numel, nbytes), stack_of(matrix)
        if stack is None or self.table.experts_per_token is None:
            return time
        experts = self.experts[stack]
        return -(-time * min(self.table.experts_per_token, experts) // experts)

    def limit(self, fixed: Sequence[tuple[MatrixRecord, Format, int]], shared: dict[str, int]) -> Limit:
        device = self.requirements.device
        assert device is not None
        specs = other_specs(self.table.other_tensors, self.table.other_dtypes, self.table.dtype)
        others = sum(spec.nbytes for spec in specs)
        fixed_use = device.read_nanoseconds(others + cache_bytes(self.table.kv_cache, self.requirements))
        fixed_use += sum(self.use(*each) for each in fixed)
        return Limit(self.name, "ns", self.nanoseconds - fixed_use)


def limit_costs(table: MeasuredTable, requirements: Requirements) -> tuple[LimitCost, ...]:
    """One `LimitCost` per pool, and one for the latency. Raises PlanError for an invalid pool or latency."""
    costs: list[LimitCost] = []
    for text in requirements.pools:
        pool = parse_pool(text)
        if not any(pool.holds(matrix.name) for matrix in table.matrices):
            raise PlanError(f"--pool {text!r} matches none of the {len(table.matrices)} matrices")
        costs.append(PoolCost(pool, table, requirements))
    if len({cost.name for cost in costs}) != len(costs):
        raise PlanError("two pools have the same name")
    if requirements.latency is not None:
        if requirements.device is None:
            raise PlanError(f"--latency {requirements.latency} depends on the device: give --device too")
        nanoseconds = parse_nanoseconds(requirements.latency, "--latency")
        costs.append(LatencyCost(nanoseconds, table, requirements, _experts_by_stack(table)))
    return tuple(costs)


def _experts_by_stack(table: MeasuredTable) -> Mapping[str, int]:
    return Counter(stack for matrix in table.matrices if (stack := stack_of(matrix)) is not None)
