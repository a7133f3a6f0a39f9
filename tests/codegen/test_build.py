"""Kernels of an artifact: compiled without a GPU, free of spills, the same bytes every time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from plans import plan_of

from reallm.codegen import build
from reallm.codegen.build import compile_kernels, emit_kernels
from reallm.codegen.check import check_sources
from reallm.codegen.emit import emit
from reallm.codegen.launch import MAX_BATCH, kernels_for
from reallm.codegen.operations import CodegenError
from reallm.kernels.formats import Format

triton = pytest.importorskip("triton", reason="Triton is an extra")

PLAN = plan_of(
    ("a.q", "int4-g64", 576, 576),
    ("a.k", "nf3-g64-dq8x256+r16", 192, 576),
    ("a.up", "aq2x8-d8-shared+r8i8", 1536, 576),
    ("a.down", "uint5-g24+ldl", 576, 77),
    ("b.q", "int4-g64+ldl", 576, 576),
    ("b.o", "bf16", 576, 576),
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
        assert set(entry["targets"]) == {"sm_80", "sm_90"}
        assert {f"{kernel}{end}" for end in (".py", ".sm_80.cubin", ".sm_80.ptx", ".sm_90.cubin")} <= set(files)
    assert len(files) == 4 * len(manifest["kernels"])
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
    }
    assert {kernel for kernels in manifest["matrices"].values() for kernel in kernels} == set(manifest["kernels"])


def test_objects_are_for_their_targets_and_the_portable_one_is_sm_80(built: Path) -> None:
    for name, raw in contents(built).items():
        if name.endswith(".cubin"):
            assert raw[:4] == b"\x7fELF"
        if name.endswith(".ptx"):
            assert re.search(rb"^\.target sm_80$", raw, re.MULTILINE)


def test_no_kernel_spills_or_uses_local_memory(built: Path) -> None:
    assert_no_spills(built / "kernels")


@pytest.mark.parametrize("name", ["lm3-g64+r128", "uint5-g64-dq6x64", "aq4x12-d8"])
def test_no_kernel_of_the_largest_tile_and_batch_spills(tmp_path: Path, name: str) -> None:
    specs = [replace(spec, batch=MAX_BATCH) for spec in kernels_for(Format.parse(name), 49152, 4096, True)[-1:]]
    for spec in specs:
        (tmp_path / f"{spec.name}.py").write_text(emit(spec))
    compile_kernels(specs, tmp_path, ["sm_80"], "bf16")
    assert_no_spills(tmp_path)


def assert_no_spills(folder: Path) -> None:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    paths = sorted(folder.glob("*.cubin"))
    assert paths
    for path in paths:
        done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
        assert [(stack, local) for _, stack, local in found] == [("0", "0")], f"{path.name}: {done.stdout}"


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
    assert len(manifest["files"]) == len(manifest["kernels"]) == 6


def test_unknown_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match="'gfx942'"):
        emit_kernels(PLAN, tmp_path, ["gfx942"])
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
