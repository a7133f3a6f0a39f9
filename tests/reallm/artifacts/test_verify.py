"""Artifacts: any changed bit is found, nothing half-written appears, damaged or hostile ones give one clear error."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import Made, make
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import Codes
from transformers import AutoModelForCausalLM

from reallm.artifacts.directory import read_config
from reallm.artifacts.inspect import inspect
from reallm.artifacts.manifest import MANIFEST_FILE, artifact_files, write_manifest
from reallm.artifacts.quantization_config import read_quantization
from reallm.artifacts.verify import read_bytes, verify
from reallm.compilation.compile import compile_plan
from reallm.errors import UserError
from reallm.kernels.storage import safetensors_writer as weights_module
from reallm.kernels.storage.safetensors_reader import read_folder
from reallm.kernels.storage.safetensors_writer import write_weights
from reallm.planner.tables.records import RecordError
from reallm.runtime.load import load

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    yield make("llama-tied", tmp_path_factory.mktemp("made"))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def reseal(folder: Path) -> None:
    """Write a manifest that fits what is in `folder` now: what an attacker would do, or a careless tool."""
    old = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).unlink()
    write_manifest(folder, old["tensors"], old["model_sha256"], old["plan_sha256"])


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_single_flipped_bit_is_found(made: Made, data: st.DataObject) -> None:
    files = [path for _, path in artifact_files(made.folder)] + [made.folder / MANIFEST_FILE]
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(bytes(changed))
        with pytest.raises(UserError) as caught:
            verify(made.folder)
    finally:
        path.write_bytes(content)
    assert "\n" not in str(caught.value)
    assert verify(made.folder).deep


def test_every_bit_of_the_manifest_is_guarded(made: Made) -> None:
    path = made.folder / MANIFEST_FILE
    content = path.read_bytes()
    try:
        for position in range(0, len(content), 97):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            path.write_bytes(bytes(changed))
            with pytest.raises(UserError):
                verify(made.folder, deep=False)
    finally:
        path.write_bytes(content)


def test_verify_counts_what_it_checked(made: Made) -> None:
    report = verify(made.folder)
    assert report.matrices == len(made.packed.names) and report.tensors == len(read_folder(made.folder))
    assert report.files == len(list(artifact_files(made.folder))) + 1


@pytest.mark.parametrize("damage", ["missing", "extra", "cut", "no manifest", "nothing"])
def test_a_folder_that_is_not_whole_is_refused_without_reading_tensors(copied: Path, damage: str) -> None:
    if damage == "missing":
        (copied / "tokenizer_config.json").unlink()
    elif damage == "extra":
        (copied / "adapter_config.json").write_text("{}")
    elif damage == "cut":
        data = (copied / "model.safetensors").read_bytes()
        (copied / "model.safetensors").write_bytes(data[:-64])
    elif damage == "no manifest":
        (copied / MANIFEST_FILE).unlink()
    else:
        shutil.rmtree(copied)
    with pytest.raises(UserError):
        verify(copied, deep=False)
    with pytest.raises(UserError):
        load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": {"int9-g64": [QUERY]}}, "bits"),
        ({"formats": {"bogus": [QUERY]}}, "bogus"),
        ({"formats": {"INT4-g16": [QUERY]}}, "canonically"),
        ({"formats": {"int4-g16": ["model.layers.7.self_attn.q_proj"]}}, "does not have"),
        ({"formats": {"int4-g16": ["model.norm"]}}, "neither a linear nor an embedding"),
        ({"formats": {"int4-g16": ["__class__"]}}, "does not have"),
        ({"formats": {"int4-g16": [QUERY, QUERY]}}, "twice"),
        ({"formats": {"aq2x4-d4-shared": [QUERY]}, "shared": {}}, "shared codebooks"),
        ({"formats": {"int4-g16": [QUERY]}, "shared": {"aq2x4-d4-shared@x": [QUERY]}}, "cannot use"),
        ({"tied": {"lm_head": "model.norm"}}, "expected a head"),
        ({"version": 2}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"decode": "eval"}, "decode"),
        ({"formats": "int4-g16"}, "formats"),
    ],
)
def test_a_hostile_quantization_config_is_refused(copied: Path, change: dict[str, Any], message: str) -> None:
    if "formats" in change and "shared" not in change:
        change = {**change, "shared": {}}
    change_config(copied, **change)
    with pytest.raises(UserError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_config_that_disagrees_with_the_plan_is_refused_even_if_sealed(copied: Path) -> None:
    formats = read_config(copied)["quantization_config"]["formats"]
    first, second = [name for name in formats if "shared" not in name][:2]
    change_config(copied, formats={**formats, first: formats[second], second: formats[first]})
    reseal(copied)
    with pytest.raises(UserError, match="in the plan"):
        verify(copied)


def rewrite(folder: Path, drop: str | None = None, **replace: tuple[str, tuple[int, ...], bytes]) -> None:
    tensors = {
        name: replace.get(name, (tensor.dtype, tensor.shape, read_bytes(tensor).tobytes()))
        for name, tensor in read_folder(folder).items()
        if name != drop
    }
    write_weights(folder, tensors)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.words", "model.layers.0.input_layernorm.weight"])
def test_a_missing_tensor_fails_loading_instead_of_becoming_random(copied: Path, name: str) -> None:
    rewrite(copied, drop=name)
    with pytest.raises(UserError, match=f"{name}.*missing"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize("change", ["longer", "float"])
def test_a_field_of_another_size_or_type_fails_loading(copied: Path, change: str) -> None:
    name = f"{QUERY}.codes"
    size = read_folder(copied)[name].shape[0]
    spec = ("U8", (size + 64,), b"\0" * (size + 64)) if change == "longer" else ("F32", (size // 4,), b"\0" * size)
    rewrite(copied, **{name: spec})
    with pytest.raises(UserError, match="expected U8"):
        AutoModelForCausalLM.from_pretrained(copied)


def test_codes_that_are_not_the_plans_are_found_even_if_sealed(copied: Path) -> None:
    name = f"{QUERY}.codes"
    tensor = read_folder(copied)[name]
    raw = bytearray(read_bytes(tensor).tobytes())
    raw[0] ^= 1
    rewrite(copied, **{name: (tensor.dtype, tensor.shape, bytes(raw))})
    reseal(copied)
    with pytest.raises(UserError):
        verify(copied)


def test_code_that_comes_with_an_artifact_is_not_run(copied: Path) -> None:
    witness = copied.parent / "witness"
    (copied / "evil.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    config = json.loads((copied / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json|evil"):
        load(copied)
    load(copied, verify=False)
    assert not witness.exists()


def test_an_existing_folder_is_kept_unless_it_is_an_artifact_and_forced(made: Made, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="not a reallm artifact"):
            made.again(taken, force=force)
    assert (taken / "thesis.txt").read_text() == "mine"
    out = made.again(tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        made.again(out)
    (out / "README.md").write_text("old")
    assert (made.again(out, force=True) / "README.md").read_text() != "old"
    assert verify(out) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


@pytest.mark.parametrize("when", ["weights", "manifest"])
def test_a_full_disk_leaves_what_was_there(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out = made.again(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module, name = (
        (weights_module, "_write_synced") if when == "weights" else ("reallm.compilation.compile.write_manifest", None)
    )
    if name is None:
        monkeypatch.setattr(str(module), full)
    else:
        monkeypatch.setattr(module, name, full)
    for target, force in ((tmp_path / "new", False), (out, True)):
        with pytest.raises(UserError, match="No space left"):
            made.again(target, force=force)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and verify(out).deep


def test_an_interrupt_leaves_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(Codes):
        def fields(self, choice: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_plan(made.plan, tmp_path / "out", model=made.loaded, codes=Interrupting(made.packed), kernels=False)
    assert not list(tmp_path.iterdir())


def test_a_damaged_plan_is_refused(made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(made.plan.read_text()[:-40])
    with pytest.raises(RecordError, match="plan"):
        compile_plan(plan, tmp_path / "out", model=made.loaded, codes=Codes(made.packed))
    with pytest.raises(RecordError, match="does not exist"):
        compile_plan(tmp_path / "none.json", tmp_path / "out", model=made.loaded, codes=Codes(made.packed))


def test_inspect_adds_up(made: Made) -> None:
    view = inspect(made.folder)
    assert view.architecture == "LlamaForCausalLM"
    assert sum(entry.nbytes for entry in view.matrices) + view.shared_bytes == view.plan.matrices_bytes
    assert sum(group.matrices for group in view.formats.values()) == len(view.matrices)
    assert sum(view.bits_histogram.values()) == sum(m.rows * m.cols for m in made.loaded.matrices)
    assert view.other_tensors == len(made.loaded.other_tensors())


def test_the_record_survives_a_round_trip(made: Made) -> None:
    value = read_config(made.folder)["quantization_config"]
    assert json.loads(json.dumps(read_quantization(value).model_dump(mode="json"))) == value


def test_no_path_of_this_machine_is_in_what_transformers_writes(made: Made) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert str(made.folder.parent) not in (made.folder / name).read_text()


def test_load_takes_dtype_decode_and_device(made: Made) -> None:
    model, tokenizer = load(made.folder, dtype=torch.bfloat16, decode="call", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training and tokenizer is not None
    assert len(tokenizer("abc")["input_ids"]) == 3
    with pytest.raises(UserError, match="not a reallm artifact"):
        load(made.source)
