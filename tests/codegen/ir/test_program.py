"""Programs: how they are lowered and printed, what the verifier refuses, what the passes do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import plan_of
from strategies import formats

from reallm.codegen.ir.lower import LOWERINGS, has_kernel, lower, lower_plan
from reallm.codegen.ir.operations import (
    AddLowRank,
    CodegenError,
    Dot,
    GroupScale,
    Levels,
    Operation,
    Prepare,
    Project,
    RowScale,
    Store,
    Unpack,
)
from reallm.codegen.ir.program import MatrixProgram, Program, Tile
from reallm.codegen.ir.verify import verify_program
from reallm.codegen.passes.choose_tiles import chunk_tile
from reallm.codegen.passes.hoist_row_scales import hoist_row_scales
from reallm.codegen.passes.run import PASSES, run_passes
from reallm.codegen.passes.share_inputs import share_inputs
from reallm.codegen.triton.emit import DERIVED, emit, pointers
from reallm.kernels.formats.codecs import AnyCodec, DenseCodec, NeuralCodec
from reallm.kernels.formats.formats import Format

GOLDEN = Path(__file__).parents[1] / "golden"
MIXED = plan_of(
    ("layers.0.q_proj", "nf3-g64+ldl+r16", 576, 576),
    ("layers.0.k_proj", "uint4-g0-dq8x256", 192, 576),
    ("layers.0.o_proj", "bf16", 576, 576),
    ("layers.0.up_proj", "aq2x8-d8-shared+r8i8", 1536, 576),
    ("layers.0.down_proj", "int4-g64", 576, 1536),
    ("layers.1.q_proj", "tq2.25-l12+ldl2+rot+o5+r8i4", 576, 576),
    ("layers.1.k_proj", "tq3-l12+ldl2+rot", 192, 576),
    ("layers.1.o_proj", "e8p3+ldl+perm", 576, 576),
    ("layers.1.up_proj", "km3", 1536, 576),
)


def matrix(name: str, rows: int = 8, cols: int = 64) -> MatrixProgram:
    fmt = Format.parse(name)
    return MatrixProgram("m", rows, cols, fmt, lower(fmt))


def with_operations(name: str, *operations: Operation) -> Program:
    return Program((replace(matrix(name), operations=operations),))


def test_program_prints_as_before() -> None:
    program = lower_plan(MIXED, biased={"layers.0.q_proj"})
    text = f"# lowered\n{program}# after the passes\n{run_passes(program)}"
    assert text == (GOLDEN / "program.txt").read_text()


@pytest.mark.parametrize("name", ["nf3-g64+r16", "aq2x8-d8", "uint5-g24-dq6x64", "tq2-l12+rot"])
def test_source_prints_as_before(name: str) -> None:
    kernels = run_passes(Program((matrix(name, 576, 576),))).kernels
    assert "\n".join(emit(kernel) for kernel in kernels) == (GOLDEN / f"{name}.py.txt").read_text()


@given(formats.filter(lambda fmt: not has_kernel(fmt)))
def test_a_format_without_kernels_is_refused_and_left_out_of_a_program(fmt: Format) -> None:
    with pytest.raises(CodegenError, match=r"no generated kernel|is dense"):
        lower(fmt)


def test_every_codec_is_in_the_table_of_lowerings() -> None:
    assert set(LOWERINGS) == set(get_args(AnyCodec))
    assert {codec for codec, lowering in LOWERINGS.items() if lowering is None} == {DenseCodec, NeuralCodec}


ORDERS = (1, 12, 77, 96, 576, 1536, 4096)
"""Orders of rotations: the bases of all numbers would take gigabytes."""
COMPUTED = {"x", "y", "t", "bias", "ready", "norms", "part", "base_in", "base_out", "signs_in", "signs_out"}
TABLES = {"pairs", "grid", "roots"}


@given(formats.filter(has_kernel), st.sampled_from(ORDERS), st.sampled_from(ORDERS), st.booleans())
def test_every_format_with_kernels_has_a_verified_program(fmt: Format, rows: int, cols: int, prefill: bool) -> None:
    program = run_passes(
        Program((MatrixProgram("m", rows, cols, fmt, lower(fmt, bias=True, prefill=prefill), prefill=prefill),))
    )
    stored = {field.name for field in fmt.fields(rows, cols)} | ({"codebooks"} if fmt.shared_field else set())
    expected = {DERIVED.get(name, (name, ""))[0] for name in stored}
    passed = {name for kernel in program.kernels for name, _ in pointers(kernel)}
    tables = TABLES if "levels" in stored else TABLES | {"levels"}
    assert expected == passed - COMPUTED - tables
    for kernel in program.kernels:
        compile(emit(kernel), kernel.name, "exec")


def test_dense_matrices_have_no_program() -> None:
    assert "layers.0.o_proj" not in [entry.name for entry in lower_plan(MIXED).matrices]
    with pytest.raises(CodegenError, match="dense"):
        lower(Format.parse("bf16"))


LEVELS, SCALE = Levels("int", 4), GroupScale(64)


@pytest.mark.parametrize(
    ("operations", "fault"),
    [
        ((LEVELS, SCALE, Dot(), Store()), "takes codes, not words"),
        ((Unpack(4), LEVELS, SCALE, Dot()), "ends in sums"),
        ((Unpack(4), LEVELS, Dot(), Store()), "0 scales"),
        ((Unpack(4), LEVELS, SCALE, SCALE, Dot(), Store()), "2 scales"),
        ((Unpack(3), LEVELS, SCALE, Dot(), Store()), "are stored"),
        ((Project("f16"), Unpack(4), LEVELS, SCALE, Dot(), Store()), "without its low-rank term"),
        ((Unpack(4), LEVELS, SCALE, Dot(), AddLowRank(8, "f16"), Store()), "without its low-rank term"),
        ((Project("f16"), Unpack(4), LEVELS, Dot(), AddLowRank(8, "f16"), RowScale(), Store()), "after something"),
    ],
)
def test_verifier_refuses(operations: tuple[Operation, ...], fault: str) -> None:
    with pytest.raises(CodegenError, match=rf"program of 'm' \(int4-g64\).*{fault}|{fault}"):
        verify_program(with_operations("int4-g64", *operations))


def test_verifier_refuses_a_scale_behind_the_low_rank_term() -> None:
    ops = lower(Format.parse("int4-g0+r8"))
    low = next(op for op in ops if isinstance(op, AddLowRank))
    bad = (*(op for op in ops if not isinstance(op, GroupScale | AddLowRank | Store)), low, RowScale(), Store())
    with pytest.raises(CodegenError, match="scales a row after something was added"):
        verify_program(with_operations("int4-g0+r8", *bad))


def test_verifier_refuses_what_32_bits_cannot_index() -> None:
    with pytest.raises(CodegenError, match="32-bit indices"):
        verify_program(Program((matrix("aq4x8-d2", 2**16, 2**15),)))
    verify_program(Program((matrix("int4-g64", 128256, 16384),)))


def test_verifier_refuses_tiles_and_kernels_that_do_not_fit() -> None:
    with pytest.raises(CodegenError, match="powers of two"):
        verify_program(Program((replace(matrix("int4-g64"), tile=Tile(3, 64, 1)),)))
    done = run_passes(Program((matrix("int4-g64"),))).matrices[0]
    with pytest.raises(CodegenError, match="in order"):
        verify_program(Program((replace(done, operations=lower(Format.parse("int4-g64"), bias=True)),)))


def test_row_scales_move_behind_the_dot_and_group_scales_stay() -> None:
    hoisted = hoist_row_scales(Program((matrix("aq1x8-d8"), matrix("int4-g0"), matrix("int4-g64"))))
    kinds = [[type(op) for op in entry.operations] for entry in hoisted.matrices]
    assert [RowScale in kind for kind in kinds] == [True, True, False]
    assert [kind[kind.index(Dot) + 1] for kind in kinds[:2]] == [RowScale, RowScale]


def test_the_rotation_of_a_shared_input_is_made_once() -> None:
    rotated, permuted = "tq2-l12+ldl2+rot", "tq2-l12+rot+perm"
    plan = plan_of(
        ("layers.0.q_proj", rotated, 64, 96),
        ("layers.0.k_proj", "tq3-l10+rot", 32, 96),
        ("layers.0.v_proj", permuted, 32, 96),
        ("layers.0.o_proj", rotated, 96, 64),
        ("layers.1.q_proj", rotated, 64, 96),
    )
    shared = share_inputs(lower_plan(plan))
    made = [any(isinstance(op, Prepare) for op in entry.operations) for entry in shared.matrices]
    assert made == [True, False, True, True, True]
    verify_program(shared)
    with pytest.raises(CodegenError, match="which no earlier matrix of 96 columns can share"):
        verify_program(Program(shared.matrices[1:]))


def test_equal_specifications_share_a_kernel() -> None:
    plan = plan_of(
        *((f"layers.{i}.q_proj", name, 576, 576) for i, name in enumerate(("int4-g64", "int4-g64+ldl") * 8)),
        ("layers.0.up", "aq2x8-d8-shared+r8", 576, 576),
        ("layers.0.down", "aq2x8-d8+r8", 576, 576),
        ("layers.1.down", "nf3-g64+r16", 576, 576),
    )
    program = run_passes(lower_plan(plan))
    assert [re.split(r"-n\d", kernel.name)[0] for kernel in program.kernels] == [
        "gemv-aq2x8-d8-r8",
        "gemv-int4-g64",
        "gemv-nf3-g64-r16",
        "project-f16",
    ]


@pytest.mark.parametrize("name", ["aq2x8-d8", "e8p3", "km4", "uint5-g24"])
def test_a_thread_of_a_product_by_chunks_has_eight_or_sixteen_weights(name: str) -> None:
    tile = chunk_tile(lower(Format.parse(name)))
    assert tile.block_n * tile.block_k in (256 * tile.num_warps, 512 * tile.num_warps)


def test_passes_are_named() -> None:
    assert [name for name, _ in PASSES] == [transform.__name__ for _, transform in PASSES]
