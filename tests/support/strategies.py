"""Hypothesis strategies: formats, shapes, packed fields, allocation problems and measured tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from consistent import consistent_fields
from hypothesis import strategies as st
from numpy.typing import NDArray

from reallm.kernels.codes.packing import pack_codes, pad
from reallm.kernels.formats.codecs import (
    SCALAR_BITS,
    AdditiveCodec,
    DenseCodec,
    DoubleQuant,
    KMeansCodec,
    LatticeCodec,
    NeuralCodec,
    ScalarCodec,
    TrellisCodec,
)
from reallm.kernels.formats.fields import Field
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank, Sparse
from reallm.planner.problem.problem import Candidate, Item, Limit, Problem
from reallm.planner.tables.measured_table import MatrixRecord, MeasuredTable, MeasurementRecord, SharedRecord
from reallm.planner.tables.tensor_layout import shared_key

shapes = st.tuples(st.integers(1, 41), st.integers(1, 83))
seeds = st.integers(0, 2**32 - 1)
costs = st.one_of(st.just(0.0), st.floats(1e-9, 10.0))

double_quants = st.builds(DoubleQuant, st.sampled_from((4, 6, 8)), st.integers(8, 4096))
scalar_codecs = st.builds(
    ScalarCodec,
    st.sampled_from(("int", "uint", "nf", "lm")),
    st.sampled_from(SCALAR_BITS),
    st.one_of(st.just(0), st.integers(8, 65536)),
    st.one_of(st.none(), double_quants),
)
additive_codecs = st.builds(
    AdditiveCodec, st.integers(1, 4), st.integers(1, 12), st.sampled_from((2, 4, 8)), st.booleans()
)
kmeans_codecs = st.builds(KMeansCodec, st.integers(2, 4))
lattice_codecs = st.builds(LatticeCodec, st.integers(2, 4))
trellis_codecs = st.builds(TrellisCodec, st.integers(8, 48), st.integers(8, 16))
neural_codecs = st.builds(
    NeuralCodec,
    st.integers(1, 4),
    st.sampled_from((1, 2, 4, 8)),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from((4, 8)),
)
feedbacks = st.sampled_from(("", "ldl", "ldl2"))
sparse_terms = st.one_of(st.none(), st.builds(Sparse, st.integers(1, 200)))
transforms = (st.booleans(), st.booleans(), st.booleans(), sparse_terms)  # permuted, channel scales, rotated, sparse
low_ranks = st.builds(LowRank, st.integers(1, 1024), st.sampled_from(("f16", "i8", "i4")))
dense_formats = st.builds(Format, st.builds(DenseCodec, st.sampled_from(("f16", "bf16", "f32"))))
formats = st.one_of(
    dense_formats,
    st.builds(
        Format,
        st.one_of(additive_codecs, kmeans_codecs, lattice_codecs, trellis_codecs, neural_codecs),
        st.one_of(st.none(), low_ranks),
        feedbacks,
        st.just(False),
        *transforms,
    ),
    st.builds(Format, scalar_codecs, st.one_of(st.none(), low_ranks), feedbacks, st.booleans(), *transforms),
)


def random_field(field: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The packed bytes of random values of one field, which are small enough for products to stay finite."""
    if field.dtype[0] == "u":
        bits = int(field.dtype[1:])
        return pack_codes(rng.integers(0, 1 << bits, field.count), bits)
    if field.dtype == "i8":
        return pad(rng.integers(-128, 128, field.count).astype(np.int8).tobytes())
    values = rng.standard_normal(field.count)
    if field.dtype == "bf16":
        return pad((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
    return pad(values.astype({"f16": "<f2", "f32": "<f4"}[field.dtype]).tobytes())


def random_packed(fmt: Format, rows: int, cols: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Random fields of a matrix [rows, cols], including the shared codebook if the format has one."""
    rng = np.random.default_rng(seed)
    fields = fmt.fields(rows, cols) + ((fmt.shared_field,) if fmt.shared_field else ())
    special = consistent_fields(fmt, rows, cols, rng)
    return {field.name: special[field.name] if field.name in special else random_field(field, rng) for field in fields}


@st.composite
def problems(draw: st.DrawFn, max_items: int = 4, max_candidates: int = 4) -> Problem:
    """Small problems, feasible or infeasible, with up to two shared codebooks."""
    keys = draw(st.lists(st.sampled_from(("book", "other")), unique=True))
    items = []
    for i in range(draw(st.integers(1, max_items))):
        count = draw(st.integers(1, max_candidates))
        options = [
            Candidate(
                draw(st.integers(1, 60)) * draw(st.sampled_from((1, 64))),
                draw(costs),
                f"f{c}",
                tuple(sorted(draw(st.lists(st.sampled_from(keys), unique=True)))) if keys else (),
            )
            for c in range(count)
        ]
        items.append(Item(f"m{i}", tuple(options)))
    sizes = {key: draw(st.integers(1, 40)) * 64 for key in keys}
    largest = sum(max(c.nbytes for c in item.candidates) for item in items) + sum(sizes.values())
    return Problem(tuple(items), sizes, draw(st.integers(0, largest + 64)))


@st.composite
def limited_problems(draw: st.DrawFn) -> Problem:
    """Small problems with up to two further limits, and perhaps a maximum number of formats."""
    problem = draw(problems(max_items=3))
    count = draw(st.integers(0, 2))
    items = tuple(
        Item(
            i.name, tuple(replace(c, uses=tuple(draw(st.integers(0, 50)) for _ in range(count))) for c in i.candidates)
        )
        for i in problem.items
    )
    limits = []
    for n in range(count):
        shared = {key: draw(st.integers(0, 20)) for key in problem.shared if draw(st.booleans())}
        largest = sum(max(c.uses[n] for c in item.candidates) for item in items) + sum(shared.values())
        limits.append(Limit(f"limit {n}", "bytes", draw(st.integers(0, largest + 5)), shared))
    return Problem(items, problem.shared, problem.capacity, tuple(limits), draw(st.sampled_from((None, None, 1, 2))))


NEURAL = "nd1x4-d2-c4x1-t2-w8"
MEASURED = ("int2-g8", "nf3-g16", "int4-g8", "int8-g0+r1", "aq1x4-d4-shared", "aq1x4-d4-shared+r1", NEURAL)
KINDS = ("linear", "linear", "linear", "embedding", "head")


@st.composite
def tables(draw: st.DrawFn, max_matrices: int = 4, experts: bool = False) -> MeasuredTable:
    """Small measured tables; every linear matrix has a candidate, embedding and head may have none."""
    matrices = []
    for i in range(draw(st.integers(1, max_matrices))):
        rows, cols = draw(st.integers(1, 24)), draw(st.integers(1, 48))
        kind = "linear" if i == 0 else draw(st.sampled_from(KINDS))
        family = draw(st.sampled_from(("q", "k")))
        matrices.append(_matrix(f"blocks.{i}.{family}", rows, cols, kind, family, draw(st.sampled_from(("a", "b")))))
    if experts:
        rows, cols = draw(st.integers(1, 24)), draw(st.integers(1, 24))
        count = draw(st.integers(1, 3))
        matrices += [_matrix(f"moe.up.{e}", rows, cols, "expert", "up", f"moe{e}") for e in range(count)]
    measurements = []
    for m in matrices:
        min_formats = 1 if m.kind in ("linear", "expert") else 0
        names = draw(st.lists(st.sampled_from(MEASURED), unique=True, min_size=min_formats, max_size=4))
        measurements += [_measurement(m, name, draw(costs)) for name in names]
    return _table(matrices, draw(st.permutations(measurements)))


def _matrix(name: str, rows: int, cols: int, kind: str, family: str, source: str) -> MatrixRecord:
    return MatrixRecord.model_validate(
        {
            **{"name": name, "rows": rows, "cols": cols, "kind": kind, "block": 0},
            **{"input": source, "family": family, "source_bytes": 2 * rows * cols},
        }
    )


def _measurement(matrix: MatrixRecord, name: str, cost: float) -> MeasurementRecord:
    nbytes = Format.parse(name).nbytes(matrix.rows, matrix.cols)
    return MeasurementRecord(
        matrix=matrix.name,
        format=name,
        nbytes=nbytes,
        guided=cost,
        two_sided=cost,
        fisher=2 * cost,
        relative=cost / 2,
        seconds=0.5,
        codes_sha256="0" * 64,
    )


def _table(matrices: list[MatrixRecord], measurements: list[MeasurementRecord]) -> MeasuredTable:
    families = {m.name: m.family for m in matrices}
    books = {}
    for record in measurements:
        fmt = Format.parse(record.format)
        key = shared_key(fmt, families[record.matrix])
        if key and fmt.shared_field:
            books[key] = fmt.shared_field.nbytes
    return MeasuredTable(
        model="tiny",
        model_sha256="1" * 64,
        text="text",
        text_sha256="2" * 64,
        settings={"seed": 0},
        dtype="bf16",
        other_tensors={"norm.weight": (17,), "blocks.0.norm.weight": (3, 5)},
        matrices=tuple(matrices),
        measurements=tuple(measurements),
        shared=tuple(SharedRecord(key=key, nbytes=size, sha256="3" * 64) for key, size in sorted(books.items())),
    )


def make_table(*rows: tuple[str, int, int, str, dict[str, float]]) -> MeasuredTable:
    """A table written by hand: (name, rows, cols, kind, format -> cost) per matrix; the last part is the family."""
    matrices = [
        _matrix(name, n, k, kind, name.rsplit(".", 1)[-1], f"{name.rsplit('.', 1)[0]}.input")
        for name, n, k, kind, _ in rows
    ]
    measurements = [
        _measurement(matrix, fmt, cost)
        for matrix, (*_, by_format) in zip(matrices, rows, strict=True)
        for fmt, cost in by_format.items()
    ]
    return _table(matrices, measurements)
