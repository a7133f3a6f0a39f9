"""The model card: where the original is on the hub, and never where it was on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import make

from reallm.compilation.model_card import hub_name, model_card
from reallm.planner.tables.plan import read_plan

CACHED = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abc"


@pytest.mark.parametrize("source", ["Qwen/Qwen3-8B", CACHED, f"{CACHED}/"])
def test_a_model_of_the_hub_has_its_name_there(source: str) -> None:
    assert hub_name(source) == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    "source", ["/models/mine", "./models/mine", "mine", "a/b/c", "x/model.gguf", f"{CACHED}/model-Q4.GGUF", "~/mine"]
)
def test_a_local_model_has_none(source: str) -> None:
    assert hub_name(source) is None


def test_a_local_folder_of_two_parts_is_not_taken_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("models/mine") is None and hub_name("models/other") == "models/other"


def test_the_card_names_the_original_only_by_its_name_on_the_hub(tmp_path: Path) -> None:
    made = make("llama", tmp_path, lambda m: "int4-g16" if m.kind == "linear" else None)
    card = (made.folder / "README.md").read_text()
    metadata = card.split("---")[1]
    assert "base_model" not in metadata and str(tmp_path) not in card
    assert "library_name: transformers" in metadata and "tags: [reallm]" in metadata
    named = model_card(read_plan(made.plan), "Qwen/Qwen3-8B")
    assert "base_model: Qwen/Qwen3-8B" in named.split("---")[1]
