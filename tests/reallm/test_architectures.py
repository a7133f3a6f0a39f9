"""Whole pipeline on tiny models of architectures that differ in kind; `make sweep` runs it on all of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures.cases import select
from architectures.pipeline import run_case
from tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

REPRESENTATIVES = (
    "deepseek_v3",  # mixture with a float32 bias in a bfloat16 model, latent attention
    "glm4_moe",
    "llama4_text",  # routers that return tuples, experts multiplied in one call
    "phimoe",
    "gemma3n_text",  # several streams, an embedding per layer
    "gemma4_text+shared-kv",  # keys and values of one layer used by another
    "jamba",  # attention, state space and experts
    "dbrx",  # experts as 2-D parameters
    "olmo",  # no parameter besides the matrices
    "qwen3_5",  # linear attention and a vision tower
    "gemma3",
    "qwen2_5_vl",
)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_every_stage_agrees_with_its_reference(name: str, tmp_path: Path) -> None:
    (case,) = [case for case in select([name]) if case.name == name]
    outcome = run_case(case, tmp_path, tiny_tokenizer())
    assert outcome.status == "passes", f"{outcome.stage}: {outcome.error}"
    assert outcome.kind != "image" or "kl_int8_picture" in outcome.figures, outcome.notes


def test_a_model_that_needs_more_than_tokens_is_refused_before_any_work(tmp_path: Path) -> None:
    (case,) = [case for case in select(["t5"]) if case.name == "t5"]
    outcome = run_case(case, tmp_path, tiny_tokenizer())
    assert outcome.status == "refused" and "encoder-decoder" in outcome.error
    assert not (tmp_path / "work").exists()
