"""Grouped launches: which matrices are grouped, what the verifier refuses, their values and machine code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import interpreted
import pytest
from gpu_objects import gpu_objects, machine_code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted import random_call
from machine_code.cost import product_cost
from machine_code.sass import lint
from plans import plan_of
from strategies import kmeans_codecs, lattice_codecs, sparse_terms

from reallm.codegen.artifact.build import emit_kernels
from reallm.codegen.ir.lower import lower_plan
from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import Program
from reallm.codegen.ir.verify import verify_program
from reallm.codegen.launch.bindings import StoredMatrix
from reallm.codegen.launch.grouped import MAX_ROWS, Member, group_of_leader, multiply_group, program_of
from reallm.codegen.launch.instances import MAX_BATCH
from reallm.codegen.passes.choose_tiles import trellis_tile
from reallm.codegen.passes.run import run_passes
from reallm.codegen.passes.share_kernels import cut
from reallm.codegen.triton.emit import emit
from reallm.kernels.formats.codecs import AdditiveCodec, AnyCodec, ScalarCodec, TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.formats.terms import LowRank

pytest.importorskip("triton", reason="Triton is an extra")

GOLDEN = Path(__file__).parents[1] / "golden"
TRELLIS = "tq2-l12+ldl2+rot"
BLOCK = plan_of(
    ("a.q_proj", TRELLIS, 576, 576),
    ("a.k_proj", "tq3-l12+ldl2+rot+r4i4", 192, 576),
    ("a.v_proj", "tq2.25-l12+ldl2+rot", 192, 576),
    ("a.o_proj", TRELLIS, 576, 576),
    ("a.gate_proj", "int4-g64", 1536, 576),
    ("a.up_proj", "int4-g64+ldl", 1536, 576),
    ("b.q_proj", TRELLIS, 576, 576),
    ("b.k_proj", "tq2-l10+rot", 192, 576),
    ("b.v_proj", "tq2-l12+rot+perm", 192, 576),
    ("b.gate_proj", "int4-g64", 1536, 576),
    ("b.up_proj", "int4-g32", 1536, 576),
)


def members(name: str, rows: tuple[int, ...], cols: int) -> tuple[Member, ...]:
    names = ("q_proj", "k_proj", "v_proj")
    return tuple(Member(m, Format.parse(name), n, cols, False) for m, n in zip(names, rows, strict=False))


def test_alike_products_of_one_input_are_grouped_and_so_are_equal_finish_kernels() -> None:
    program = run_passes(lower_plan(BLOCK))
    groups = [(group.matrices, group.kernel.function, group.kernel.members) for group in program.groups]
    assert groups == [
        (("a.q_proj", "a.k_proj", "a.v_proj"), "gemv", 3),
        (("a.q_proj", "a.v_proj"), "finish", 2),
        (("a.gate_proj", "a.up_proj"), "gemv", 2),
    ]
    assert program.groups[0].kernel.tile == trellis_tile(576 + 192 + 192, prefill=False)
    assert {group.kernel for group in program.groups} <= set(program.kernels)


def test_source_prints_as_before() -> None:
    (group,) = program_of(members("aq2x8-d8", (576, 192, 192), 576), prefill=False).groups
    assert emit(group.kernel) == (GOLDEN / "aq2x8-d8-x3.py.txt").read_text()


def test_a_biased_matrix_is_not_grouped_with_one_without() -> None:
    program = run_passes(lower_plan(BLOCK, biased={"a.up_proj"}))
    assert ("a.gate_proj", "a.up_proj") not in [group.matrices for group in program.groups]


def test_only_the_first_of_a_group_leads_it() -> None:
    mixed = (*members(TRELLIS, (64, 32), 96), Member("v_proj", Format.parse("int4-g32"), 32, 96, False))
    assert [m.name for m in group_of_leader(mixed, "q_proj")] == ["q_proj", "k_proj"]
    assert group_of_leader(mixed, "k_proj") == group_of_leader(mixed, "v_proj") == ()


def with_matrices(program: Program, index: int, matrices: tuple[str, ...]) -> Program:
    groups = list(program.groups)
    groups[index] = replace(groups[index], matrices=matrices)
    return replace(program, groups=tuple(groups))


@pytest.mark.parametrize(
    ("index", "matrices", "fault"),
    [
        (0, ("a.k_proj", "a.q_proj", "a.v_proj"), "in the program's order"),
        (0, ("a.q_proj", "a.q_proj", "a.v_proj"), "each matrix once"),
        (0, ("a.q_proj", "a.k_proj"), "2 matrices for a kernel of 3"),
        (0, ("a.q_proj", "a.k_proj", "b.q_proj"), "different inputs"),
        (0, ("b.q_proj", "b.k_proj", "b.v_proj"), "different inputs"),
        (2, ("b.gate_proj", "b.up_proj"), "whose operations differ"),
        (0, ("a.q_proj", "a.k_proj", "nobody"), "no matrix 'nobody'"),
    ],
)
def test_verifier_refuses_a_group(index: int, matrices: tuple[str, ...], fault: str) -> None:
    with pytest.raises(CodegenError, match=rf"group .*: .*{fault}"):
        verify_program(with_matrices(run_passes(lower_plan(BLOCK)), index, matrices))


def test_verifier_refuses_overlapping_groups_and_a_finish_without_its_product() -> None:
    program = run_passes(lower_plan(BLOCK))
    with pytest.raises(CodegenError, match=r"shares 'a\.k_proj' with another group"):
        verify_program(replace(program, groups=(program.groups[0], replace(program.groups[0]))))
    with pytest.raises(CodegenError, match="whose products are not one group"):
        verify_program(replace(program, groups=program.groups[1:]))


def test_verifier_refuses_different_numbers_of_columns() -> None:
    plan = plan_of(("q_proj", "int4-g32", 8, 64), ("k_proj", "int4-g32", 8, 96))
    program = run_passes(lower_plan(plan))
    assert program.groups == ()
    (two,) = program_of(members("int4-g32", (8, 8), 64), prefill=False).groups
    with pytest.raises(CodegenError, match="different numbers of columns"):
        verify_program(replace(program, groups=(two,)))


def test_matrices_that_are_no_group_are_refused() -> None:
    import torch

    member = Member("q_proj", Format.parse("int4-g32"), 4, 64, False)
    call = random_call("int4-g32", 4, 64, 1)
    fields = {name: torch.from_numpy(raw) for name, raw in call.packed.items()}
    with pytest.raises(CodegenError, match="no product in common"):
        multiply_group([member], [StoredMatrix(member.format, fields, 4, 64)], torch.from_numpy(call.x))
    with pytest.raises(CodegenError, match="x has 33 rows"):
        multiply_group([member], [StoredMatrix(member.format, fields, 4, 64)], torch.zeros(MAX_ROWS + 1, 64))


Check = Callable[..., None]


@pytest.fixture(scope="module")
def check(interpreter: ProcessPoolExecutor) -> Check:
    def matches(
        names: list[str], rows: list[int], cols: int, batch: int, dtype: str = "float32", bias: bool = False
    ) -> None:
        made = [random_call(name, n, cols, batch, dtype, bias) for name, n in zip(names, rows, strict=True)]
        calls = tuple(replace(call, x=made[0].x) for call in made)
        results = interpreter.submit(interpreted.run_together, calls).result(timeout=300)
        for call, result in zip(calls, results, strict=True):
            interpreted.assert_matches(call, *result)

    return matches


@pytest.mark.parametrize(
    ("rows", "cols", "batch"), [([36, 12, 12], 48, 1), ([1, 1], 1, 2), ([70, 17, 33], 77, 3), ([64, 40], 35, 7)]
)
def test_trellises_of_any_rates(check: Check, rows: list[int], cols: int, batch: int) -> None:
    check(["tq2.25-l12+rot", "tq3-l12+rot", "tq4.5-l12+rot+o20+r3i4"][: len(rows)], rows, cols, batch)


@pytest.mark.parametrize(
    "name", ["int4-g32", "uint3-g0", "lm3-g64-dq6x64", "aq2x8-d8-shared", "km3", "e8p3", "nf4-g64"]
)
def test_every_codec(check: Check, name: str) -> None:
    check([name + "+o5+r3i8"] * 3, [9, 1, 4], 96, 2, "float32", True)
    check([name + "+rot"] * 2, [3, 5], 77, 5, "float16")


codecs: st.SearchStrategy[AnyCodec] = st.one_of(
    st.builds(TrellisCodec, st.integers(8, 48), st.integers(8, 16)),
    lattice_codecs,
    kmeans_codecs,
    st.builds(AdditiveCodec, st.integers(1, 3), st.integers(1, 10), st.sampled_from([2, 4, 8])),
    st.builds(ScalarCodec, st.sampled_from(["int", "uint", "nf", "lm"]), st.sampled_from([2, 3, 4, 8]), st.just(16)),
)
low_ranks = st.none() | st.builds(LowRank, st.integers(1, 20), st.sampled_from(["f16", "i8", "i4"]))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(Format, codecs, low_ranks, rotated=st.booleans(), sparse=sparse_terms),
    st.lists(st.integers(1, 34), min_size=2, max_size=3),
    st.integers(1, 50),
    st.sampled_from([1, 2, 4, 7, 17]),
    st.sampled_from(["float16", "bfloat16", "float32"]),
    st.booleans(),
)
def test_any_format_and_shapes(
    check: Check, fmt: Format, rows: list[int], cols: int, batch: int, dtype: str, bias: bool
) -> None:
    known = dtype if batch <= MAX_BATCH else "float16"  # the interpreter's product of bfloat16 tiles is wrong
    check([fmt.name] * len(rows), rows, cols, batch, known, bias)


@pytest.mark.parametrize("name", [TRELLIS, "lm3-g64-dq6x64+r8", "aq2x8-d8"])
def test_the_code_is_clean_and_at_most_a_tenth_longer_than_for_a_single_matrix(name: str) -> None:
    rows, cols = (4096, 1024, 1024), 4096
    program = program_of(members(name, rows, cols), prefill=False)
    group = program.groups[0].kernel
    joined = replace(program.matrices[0], rows=sum(rows), tile=group.tile)
    single = next(kernel for kernel in cut(joined) if kernel.function == "gemv")
    assert replace(group, members=1) == single
    objects = gpu_objects([group, single])
    code = {spec: machine_code(objects[spec, "sm_80"]) for spec in (group, single)}
    assert lint(code[group]) == ()
    assert len(code[group].loops) == len(code[single].loops)
    if group.widths or group.span:
        width = 4 if group.widths else 0
        grouped, by_itself = (
            product_cost(spec, code[spec], Format.parse(name), sum(rows), cols, width=width).instructions_per_weight
            for spec in (group, single)
        )
        assert grouped <= 1.1 * by_itself


def test_a_group_compiles_for_nvidia_and_amd_and_its_code_is_clean() -> None:
    specs = [group.kernel for group in program_of(members(TRELLIS, (576, 192), 576), prefill=False).groups]
    assert [spec.function for spec in specs] == ["gemv", "finish"]
    objects = gpu_objects(specs, ("sm_80", "sm_90", "gfx942"))
    for spec in specs:
        assert objects[spec, "gfx942"].read_bytes()[:4] == b"\x7fELF"
        for target in ("sm_80", "sm_90"):
            code = machine_code(objects[spec, target])
            assert lint(code, product=spec.function == "gemv") == ()


def test_the_manifest_names_groups_and_their_kernels(tmp_path: Path) -> None:
    manifest = emit_kernels(BLOCK, tmp_path)
    groups = run_passes(lower_plan(BLOCK)).groups
    expected = [{"matrices": list(group.matrices), "kernel": group.kernel.name} for group in groups]
    assert manifest["groups"] == expected
    assert {f"{group['kernel']}.py" for group in expected} <= set(manifest["files"])


def test_the_code_of_a_group_of_gemms_is_clean() -> None:
    program = program_of(members(TRELLIS, (4096, 1024, 1024), 4096), prefill=True)
    spec = replace(program.groups[0].kernel, batch=MAX_ROWS)
    assert lint(machine_code(gpu_objects([spec])[spec, "sm_80"])) == ()
