"""The kernels of an artifact: sources, objects compiled without a GPU and free of spills, the same bytes every time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_objects import gpu_objects, machine_code
from machine_code.sass import lint, load_bits
from plans import plan_of

from reallm.codegen.artifact import build
from reallm.codegen.artifact.build import TARGETS, emit_kernels
from reallm.codegen.artifact.check_sources import check_sources
from reallm.codegen.ir.lower import lower_plan
from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.launch.instances import GEMM_BATCHES, MAX_BATCH, with_batch
from reallm.codegen.launch.launch import kernels_for
from reallm.codegen.passes.run import run_passes
from reallm.kernels.formats.formats import Format

triton = pytest.importorskip("triton", reason="Triton is an extra")

PLAN = plan_of(
    ("a.q", "int4-g64", 576, 576),
    ("a.k", "nf3-g64-dq8x256+r16", 192, 576),
    ("a.up", "aq2x8-d8-shared+r8i8", 1536, 576),
    ("a.down", "uint5-g24+ldl", 576, 77),
    ("b.q", "int4-g64+ldl", 576, 576),
    ("b.o", "bf16", 576, 576),
    ("b.down", "tq2.25-l12+ldl2+rot+r4i4", 576, 1536),
)
SMALL = plan_of(("a.q", "aq1x8-d8", 64, 64))
"""One kernel that compiles fast."""
Objects = dict[tuple[KernelSpec, str], Path]
BUILT_FOR = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of SMALL with objects for three GPUs."""
    folder = tmp_path_factory.mktemp("built")
    emit_kernels(SMALL, folder, BUILT_FOR)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of PLAN without objects."""
    folder = tmp_path_factory.mktemp("sources")
    emit_kernels(PLAN, folder, biased={"a.q"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "kernels").iterdir()}


def test_the_manifest_lists_every_file_with_its_hash(built: Path) -> None:
    files = contents(built)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    assert manifest["objects"] == "compiled"
    for kernel, entry in manifest["kernels"].items():
        assert set(entry["targets"]) == set(BUILT_FOR)
        ends = (".py", ".sm_80.cubin", ".sm_80.ptx", ".sm_90.cubin", ".gfx942.hsaco")
        assert {f"{kernel}{end}" for end in ends} <= set(files)
    assert len(files) == 5 * len(manifest["kernels"])
    assert manifest["toolchain"]["triton"] == triton.__version__


def test_without_targets_there_are_only_sources_and_the_manifest_says_so(sources: Path) -> None:
    files = contents(sources)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["objects"] == "none" and "triton" not in manifest["toolchain"]
    assert set(manifest["files"]) == set(files) == {f"{kernel}.py" for kernel in manifest["kernels"]}
    assert all(entry["targets"] == {} for entry in manifest["kernels"].values())


def test_the_manifest_says_which_kernels_each_matrix_runs(sources: Path) -> None:
    manifest = json.loads(contents(sources)["manifest.json"])
    runs = {
        name: [re.split(r"-n\d", kernel)[0] for kernel in kernels] for name, kernels in manifest["matrices"].items()
    }
    assert runs == {
        "a.q": ["gemv-int4-g64-bias"],
        "a.k": ["project-f16", "gemv-nf3-g64-dq8x256-r16"],
        "a.up": ["project-i8", "gemv-aq2x8-d8-r8i8"],
        "a.down": ["gemv-uint5-g24"],
        "b.q": ["gemv-int4-g64"],
        "b.down": ["project-i4", "prepare-rot-lifted", "gemv-tq-l12", "finish-rot-r4i4"],
    }
    assert {kernel for kernels in manifest["matrices"].values() for kernel in kernels} == set(manifest["kernels"])


def test_objects_are_for_their_targets_and_the_portable_one_is_sm_80(built: Path) -> None:
    for name, raw in contents(built).items():
        if name.endswith((".cubin", ".hsaco")):
            assert raw[:4] == b"\x7fELF"
        if name.endswith(".ptx"):
            assert re.search(rb"^\.target sm_80$", raw, re.MULTILINE)


def assert_clean(spec: KernelSpec, path: Path) -> None:
    assert lint(machine_code(path), product=spec.function.startswith("gem")) == (), (spec.name, path)


@pytest.mark.long
def test_the_machine_code_of_every_kernel_is_clean() -> None:
    specs = run_passes(lower_plan(PLAN, biased={"a.q"})).kernels
    for (spec, target), path in gpu_objects(specs, BUILT_FOR).items():
        if target.startswith("sm_"):
            assert_clean(spec, path)
        else:
            assert path.read_bytes()[:4] == b"\x7fELF"


def largest_gemv(name: str) -> KernelSpec:
    kernels = kernels_for(Format.parse(name), 49152, 4096, True)
    return with_batch(next(spec for spec in kernels if spec.function == "gemv"), MAX_BATCH)


def largest_gemm(name: str) -> KernelSpec:
    kernels = kernels_for(Format.parse(name), 4096, 4096, True, prefill=True)
    return replace(next(spec for spec in kernels if spec.function == "gemm"), batch=GEMM_BATCHES[-1])


GEMVS = ("lm3-g64+r128", "uint5-g64-dq6x64", "aq4x12-d8", "tq3-l12+rot")
GEMMS = ("tq3-l12+rot", "lm4-g64-dq6x64+r8", "lm4-g64+rot", "aq2x8-d8", "e8p4")
ROW_TABLES = "km4"


@pytest.fixture(scope="module")
def largest() -> Objects:
    """The objects of the largest kernels, compiled together."""
    return gpu_objects([*map(largest_gemv, GEMVS), *map(largest_gemm, (*GEMMS, ROW_TABLES))])


@pytest.mark.long
@pytest.mark.parametrize("name", GEMVS)
def test_the_code_of_the_largest_tile_and_batch_is_clean(largest: Objects, name: str) -> None:
    spec = largest_gemv(name)
    assert_clean(spec, largest[spec, "sm_80"])


@pytest.mark.parametrize("name", GEMMS)
def test_the_code_of_a_gemm_is_clean(largest: Objects, name: str) -> None:
    spec = largest_gemm(name)
    assert_clean(spec, largest[spec, "sm_80"])


def test_the_gemm_of_row_tables_is_clean_except_for_looking_up_levels(
    largest: Objects,
) -> None:
    code = machine_code(largest[largest_gemm(ROW_TABLES), "sm_80"])
    assert lint(code, product=False) == ()
    words = [opcode for first, end in code.loops for opcode in code.opcodes[first:end] if load_bits(opcode) > 16]
    assert any(load_bits(opcode) == 32 for opcode in words)  # the codes
    assert (
        sum(load_bits(opcode) == 16 for first, end in code.loops for opcode in code.opcodes[first:end])
        == 64 * 64 // 256
    )


def test_two_runs_in_two_folders_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    emit_kernels(SMALL, tmp_path, BUILT_FOR)
    assert contents(tmp_path) == contents(built)


def test_the_users_interpreter_and_cache_change_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    emit_kernels(SMALL, tmp_path, ["sm_80"])
    files, expected = contents(tmp_path), contents(built)
    manifest = json.loads(files.pop("manifest.json"))
    assert files == {name: raw for name, raw in expected.items() if name in files}
    assert len(files) == 3 * len(manifest["kernels"])


def test_objects_without_triton_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CodegenError, match=r"sm_80 need Triton, .* pip install 'reallm\[triton\]'"):
        emit_kernels(SMALL, tmp_path, ["sm_80"])
    assert not list(tmp_path.iterdir())
    assert emit_kernels(SMALL, tmp_path)["objects"] == "none"


@pytest.mark.parametrize("target", ["mps", "sm_8", "sm_123", "gfx"])
def test_an_unknown_target_is_refused_before_anything_is_written(target: str, tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match=f"'{target}': expected one of {', '.join(TARGETS)}"):
        emit_kernels(PLAN, tmp_path, ["sm_80", target])
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_does_not_compile_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "emit", lambda spec: "import nothing_of_that_name\n")
    with pytest.raises(CodegenError, match=r"failed \(exit code 1\): .*nothing_of_that_name") as raised:
        emit_kernels(SMALL, tmp_path, ["sm_80"])
    assert "\n" not in str(raised.value)


def test_changed_and_unknown_sources_are_reported(sources: Path, tmp_path: Path) -> None:
    assert check_sources(PLAN, sources) == ()
    names = sorted(path.name for path in (sources / "kernels").glob("*.py"))
    (tmp_path / "kernels").mkdir()
    for name in names[:-1]:
        text = (sources / "kernels" / name).read_text()
        (tmp_path / "kernels" / name).write_text(text + ("import os\n" if name == names[0] else ""))
    (tmp_path / "kernels" / "strange.py").write_text("")
    assert check_sources(PLAN, tmp_path) == (names[0].removesuffix(".py"), "strange")
