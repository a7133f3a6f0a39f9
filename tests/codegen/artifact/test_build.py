"""Kernels of an artifact: compiled without a GPU, free of spills, the same bytes every time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from plans import plan_of

from benchmarks.machine_code.sass import lint, load_bits, read_code
from reallm.codegen.artifact import build
from reallm.codegen.artifact.build import compile_kernels, emit_kernels
from reallm.codegen.artifact.check_sources import check_sources
from reallm.codegen.ir.operations import CodegenError
from reallm.codegen.launch.launch import GEMM_BATCHES, MAX_BATCH, kernels_for, with_batch
from reallm.codegen.triton.emit import emit
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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    emit_kernels(PLAN, folder, biased={"a.q"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "kernels").iterdir()}


def test_manifest_lists_every_file_with_its_hash(built: Path) -> None:
    files = contents(built)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    for kernel, entry in manifest["kernels"].items():
        assert set(entry["targets"]) == {"sm_80", "sm_90", "gfx942"}
        ends = (".py", ".sm_80.cubin", ".sm_80.ptx", ".sm_90.cubin", ".gfx942.hsaco")
        assert {f"{kernel}{end}" for end in ends} <= set(files)
    assert len(files) == 5 * len(manifest["kernels"])
    assert manifest["toolchain"]["triton"] == triton.__version__


def test_manifest_says_which_kernels_each_matrix_runs(built: Path) -> None:
    manifest = json.loads(contents(built)["manifest.json"])
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


def test_the_machine_code_of_every_kernel_is_clean(built: Path) -> None:
    assert_clean(built / "kernels")


@pytest.mark.parametrize("name", ["lm3-g64+r128", "uint5-g64-dq6x64", "aq4x12-d8", "tq3-l12+rot"])
def test_the_code_of_the_largest_tile_and_batch_is_clean(tmp_path: Path, name: str) -> None:
    last = next(s for s in kernels_for(Format.parse(name), 49152, 4096, True) if s.function == "gemv")
    spec = with_batch(last, MAX_BATCH)
    (tmp_path / f"{spec.name}.py").write_text(emit(spec))
    compile_kernels([spec], tmp_path, ["sm_80"], "bf16")
    assert_clean(tmp_path)


def built_gemm(name: str, place: Path) -> None:
    every = kernels_for(Format.parse(name), 4096, 4096, True, prefill=True)
    spec = replace(next(s for s in every if s.function == "gemm"), batch=GEMM_BATCHES[-1])
    (place / f"{spec.name}.py").write_text(emit(spec))
    compile_kernels([spec], place, ["sm_80"], "bf16")


@pytest.mark.parametrize("name", ["tq3-l12+rot", "lm4-g64-dq6x64+r8", "lm4-g64+rot", "aq2x8-d8", "e8p4"])
def test_the_code_of_a_gemm_is_clean(tmp_path: Path, name: str) -> None:
    built_gemm(name, tmp_path)
    assert_clean(tmp_path)


def test_the_gemm_of_tables_of_rows_is_clean_but_for_the_levels_it_looks_up(tmp_path: Path) -> None:
    built_gemm("km4", tmp_path)
    (path,) = tmp_path.glob("*.cubin")
    code = read_code(path)
    assert lint(code, product=False) == ()
    words = [opcode for first, end in code.loops for opcode in code.opcodes[first:end] if load_bits(opcode) > 16]
    assert any(load_bits(opcode) == 32 for opcode in words)  # the codes
    assert (
        sum(load_bits(opcode) == 16 for first, end in code.loops for opcode in code.opcodes[first:end])
        == 64 * 64 // 256
    )


def assert_clean(folder: Path) -> None:
    paths = sorted(folder.glob("*.cubin"))
    assert paths
    for path in paths:
        assert lint(read_code(path), product=path.name.startswith("gem")) == (), path.name


def test_two_runs_in_two_folders_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        emit_kernels(SMALL, tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_interpreter_or_a_cache_of_the_users_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = emit_kernels(SMALL, tmp_path / "plain", ["sm_80"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert emit_kernels(SMALL, tmp_path / "interpreted", ["sm_80"]) == plain


def test_without_triton_sources_are_written_and_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    manifest = emit_kernels(PLAN, tmp_path)
    assert manifest["objects"] == "none: Triton is not installed"
    assert {Path(name).suffix for name in manifest["files"]} == {".py"}
    assert len(manifest["files"]) == len(manifest["kernels"]) == 10


def test_unknown_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match="'mps'"):
        emit_kernels(PLAN, tmp_path, ["mps"])
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_does_not_compile_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "emit", lambda spec: "import nothing_of_that_name\n")
    with pytest.raises(CodegenError, match=r"failed \(exit code 1\): .*nothing_of_that_name") as raised:
        emit_kernels(SMALL, tmp_path, ["sm_80"])
    assert "\n" not in str(raised.value)


def test_changed_and_strange_sources_are_reported(built: Path, tmp_path: Path) -> None:
    assert check_sources(PLAN, built) == ()
    names = sorted(path.name for path in (built / "kernels").glob("*.py"))
    (tmp_path / "kernels").mkdir()
    for name in names[:-1]:
        text = (built / "kernels" / name).read_text()
        (tmp_path / "kernels" / name).write_text(text + ("import os\n" if name == names[0] else ""))
    (tmp_path / "kernels" / "strange.py").write_text("")
    assert check_sources(PLAN, tmp_path) == (names[0].removesuffix(".py"), "strange")
