"""What may be changed in a published artifact: cards, licences and pictures, and nothing that a loader acts on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import Made, make
from typer.testing import CliRunner

from reallm.artifacts.manifest import MANIFEST_FILE, FileEntry, Manifest, is_free, sha256_file, write_manifest
from reallm.artifacts.verify import verify
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.kernels.storage.atomic import canonical_json, sha256_text
from reallm.runtime.generate import generate
from reallm.runtime.load import load

FREE = (
    "README.md",
    "docs/usage.md",
    "figure.png",
    "images/loss.SVG",
    "a.jpeg",
    "LICENSE",
    "LICENSE-MODEL.txt",
    "NOTICE",
)
FREE += (".gitattributes", ".gitignore", ".git/HEAD", ".cache/huggingface/download/config.json.metadata")
GUARDED = (
    "modeling_x.py",
    "extra.safetensors",
    "pytorch_model.bin",
    "x.pt",
    "adapter_config.json",
    "chat_template.jinja",
)
GUARDED += (
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "x.so",
    "x.pkl",
    "unknown.bin",
    "noextension",
    ".env",
    "LICENSE.py",
)
GUARDED += ("kernels/__pycache__/a.pyc", "README.md.exe", "notes.txt", "images/x.py", "sub/.git/hook.py", ".cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make("llama", tmp_path_factory.mktemp("made"), lambda m: "int4-g16" if m.kind == "linear" else None)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "copy"))


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("name", FREE)
def test_cards_licences_pictures_and_files_of_git_are_free(name: str) -> None:
    assert is_free(name)


@pytest.mark.parametrize("name", GUARDED)
def test_everything_else_is_guarded(name: str) -> None:
    assert not is_free(name)


def test_free_files_may_be_added_changed_and_removed(copied: Path) -> None:
    for name in FREE:
        write(copied / name, "mine")
    report = verify(copied)
    assert set(report.unchecked) == {name for name in FREE if not name.startswith((".git/", ".cache/"))} | {
        ".git/",
        ".cache/",
    }
    model, _ = load(copied)
    assert model.can_generate() and generate(copied, "abc", max_new_tokens=2)
    said = CliRunner().invoke(app, ["verify", str(copied)])
    assert said.exit_code == 0 and "not checked" in said.stdout and "figure.png" in said.stdout
    (copied / "README.md").unlink()
    assert verify(copied).files == report.files


@pytest.mark.parametrize("name", [name for name in GUARDED if name != "chat_template.jinja"])
def test_a_guarded_file_may_not_be_added(copied: Path, name: str) -> None:
    write(copied / name, "{}")
    for check in (verify, load):
        with pytest.raises(UserError, match="only cards, licences and pictures may be added") as caught:
            check(copied)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def change_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ 'other' }}")


def change_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 7}))


@pytest.mark.parametrize("change", [change_template, change_tokenizer])
def test_a_guarded_file_may_not_change(copied: Path, change: Callable[[Path], None]) -> None:
    change(copied)
    for check in (verify, load):
        with pytest.raises(UserError, match=r"has \d+ bytes, expected|was changed after it was compiled") as caught:
            check(copied)
        assert "\n" not in str(caught.value)


def test_a_manifest_that_lists_the_card_is_still_valid(copied: Path) -> None:
    """As older versions wrote it."""
    card = copied / "README.md"
    old = Manifest.model_validate_json((copied / MANIFEST_FILE).read_bytes())
    entry = FileEntry(nbytes=card.stat().st_size, sha256=sha256_file(card))
    value = old.model_copy(update={"files": {**old.files, "README.md": entry}}).model_dump(
        mode="json", exclude={"digest"}
    )
    (copied / MANIFEST_FILE).write_text(canonical_json({**value, "digest": sha256_text(canonical_json(value))}))
    files = verify(copied).files
    card.write_text("edited")
    assert verify(copied).files == files
    card.unlink()
    assert verify(copied).files == files


def test_new_manifests_list_guarded_files_only(copied: Path) -> None:
    write(copied / "figure.png", "x")
    old = Manifest.model_validate_json((copied / MANIFEST_FILE).read_bytes())
    write_manifest(copied, old.tensors, old.model_sha256, old.plan_sha256)
    assert Manifest.model_validate_json((copied / MANIFEST_FILE).read_bytes()) == old
    assert "README.md" not in old.files and "chat_template.jinja" in old.files
