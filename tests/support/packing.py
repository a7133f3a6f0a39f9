"""Random packed matrices and plans for tests of the steps after planning, without an encoder or a solver."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from consistent import consistent_fields
from numpy.typing import NDArray

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.codes.stored_fields import codes_sha256
from reallm.kernels.formats.codecs import DENSE_NAMES, DenseCodec
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.layout import file_bytes
from reallm.models.loaded import LoadedModel, Matrix
from reallm.planner.tables.plan import Bound, Choice, Plan
from reallm.planner.tables.records import write_record
from reallm.planner.tables.tensor_layout import dense_nbytes, other_specs, shared_key, weights_tensors, whole_stacks
from reallm.system.torch_dtypes import FLOAT_NAMES

Bytes = NDArray[np.uint8]


def random_field(field: Field, rng: np.random.Generator, size: float = 1.0) -> Bytes:
    """Random valid bytes of a field; floats are normal with standard deviation `size`."""
    if field.dtype[0] == "u":
        bits = int(field.dtype[1:])
        return pack_codes(rng.integers(0, 1 << bits, field.count), bits)
    if field.dtype == "i8":
        return pad(rng.integers(-127, 128, field.count).astype("i1").tobytes())
    values = (size * rng.standard_normal(field.count)).astype("<f4")
    if field.dtype == "f16":
        return pad(values.astype("<f2").tobytes())
    if field.dtype == "bf16":
        return pad((values.view("<u4") >> 16).astype("<u2").tobytes())
    return pad(values.tobytes())


def random_fields(fmt: Format, rows: int, cols: int, seed: int, size: float = 1.0) -> dict[str, Bytes]:
    """Random bytes of every field of a matrix, including a shared codebook."""
    rng = np.random.default_rng(seed)
    fields = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    special = consistent_fields(fmt, rows, cols, rng)
    return {f.name: special[f.name] if f.name in special else random_field(f, rng, size) for f in fields}


class PackedModel:
    """Random fields for every matrix to which `choose` assigns a format, and the plan that describes them."""

    def __init__(self, loaded: LoadedModel, choose: Callable[[Matrix], str | None]) -> None:
        self.loaded = loaded
        self.names = {matrix.name: name for matrix in loaded.matrices if (name := choose(matrix))}
        self.shared: dict[str, Bytes] = {}
        self.fields: dict[str, Mapping[str, Bytes]] = {}
        for seed, matrix in enumerate(loaded.matrices):
            if matrix.name in self.names:
                self._fill(matrix, Format.parse(self.names[matrix.name]), seed)

    def _fill(self, matrix: Matrix, fmt: Format, seed: int) -> None:
        if isinstance(fmt.codec, DenseCodec):
            return
        fields = random_fields(fmt, matrix.rows, matrix.cols, seed, size=0.1)
        if key := shared_key(fmt, matrix.family):
            self.shared.setdefault(key, fields.pop("codebooks"))
            fields.pop("codebooks", None)
        self.fields[matrix.name] = fields

    def choice(self, matrix: Matrix) -> Choice:
        """The plan's entry for `matrix`."""
        fmt = Format.parse(self.names[matrix.name])
        fields = self.fields.get(matrix.name)
        dense = dense_nbytes(fmt, matrix.rows, matrix.cols)
        packed = matrix.kind == "expert" and matrix.name not in self._whole()
        return Choice(
            matrix=matrix.name,
            format=fmt.name,
            rows=matrix.rows,
            cols=matrix.cols,
            kind=matrix.kind,
            family=matrix.family,
            nbytes=fmt.nbytes(matrix.rows, matrix.cols) if dense is None or packed else dense,
            cost=0.25,
            codes_sha256=codes_sha256(fmt, matrix.rows, matrix.cols, fields) if fields else "",
        )

    def _formats(self) -> dict[str, Format]:
        own_dtype = DENSE_NAMES[FLOAT_NAMES[self.loaded.dtype]]
        return {matrix.name: Format.parse(self.names.get(matrix.name, own_dtype)) for matrix in self.loaded.matrices}

    def _whole(self) -> set[str]:
        records = [matrix.record() for matrix in self.loaded.matrices]
        return {matrix.name for slices in whole_stacks(records, self._formats()).values() for matrix in slices}

    def plan(self) -> Plan:
        """The plan with these choices; all byte counts are exact, costs and bound are arbitrary."""
        choices = tuple(self.choice(matrix) for matrix in self.loaded.matrices if matrix.name in self.names)
        shared = {key: raw.size for key, raw in self.shared.items()}
        matrices_bytes = sum(choice.nbytes for choice in choices) + sum(shared.values())
        records = [matrix.record() for matrix in self.loaded.matrices]
        dtype = FLOAT_NAMES[self.loaded.dtype]
        others = other_specs(self.loaded.other_tensors(), self.loaded.other_dtypes(), dtype)
        specs = weights_tensors(records, self._formats(), shared, others)
        total = sum(choice.cost for choice in choices)
        return Plan(
            model=self.loaded.source,
            model_sha256=self.loaded.digest,
            work="work",
            table_sha256=hashlib.sha256(b"table").hexdigest(),
            budget=f"{matrices_bytes}B",
            budget_bytes=matrices_bytes,
            scope="matrices",
            counted_bytes=matrices_bytes,
            matrices_bytes=matrices_bytes,
            file_bytes=file_bytes(specs),
            bits_per_weight=8 * matrices_bytes / sum(choice.rows * choice.cols for choice in choices),
            predicted_loss=total,
            bound=Bound(
                solver="none",
                solver_version="0",
                status="feasible",
                objective=total,
                best_bound=0.0,
                mip_gap=1.0,
                lagrangian_bound=0.0,
                shadow_price=0.0,
            ),
            choices=choices,
            shared=shared,
            dense=tuple(matrix.name for matrix in self.loaded.matrices if matrix.name not in self.names),
        )

    def write_plan(self, path: Path) -> Path:
        """Write the plan to `path`."""
        write_record(path, self.plan())
        return path


class Codes:
    """The fields of a PackedModel, with the interface that `compile_plan` expects of its `codes`."""

    def __init__(self, packed: PackedModel) -> None:
        self.packed = packed

    def fields(self, choice: Choice) -> Mapping[str, Bytes]:
        """The fields of the matrix of `choice`."""
        return self.packed.fields[choice.matrix]

    def shared(self, key: str) -> Bytes:
        """The codebooks shared under `key`."""
        return self.packed.shared[key]
