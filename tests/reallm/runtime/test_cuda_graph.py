"""The decode step on GPUs: the logits of transformers' own path, in Triton's interpreter and, where there is one, on a
GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import interpreted
import pytest
import replays
import torch
from artifacts import make
from tiny import VOCAB, tiny_model

from reallm.models.loaded import Matrix
from reallm.runtime.generate import generate
from reallm.runtime.step.cpu import CacheOverflowError
from reallm.runtime.step.generate import use_step

pytest.importorskip("triton", reason="Triton is an extra")

KNOWN = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 1}
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CASES: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in KNOWN),
    ("mistral", {"sliding_window": 7}),
    ("gemma2", CAPS),
    ("gemma3", KINDS),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 20, "num_key_value_heads": 3}),
    ("llama", {"hidden_size": 51, "intermediate_size": 83}),
]
TOLERANCE = 2e-5
"""As in test_step: float32 sums in another order."""
FEW = {"q_proj": "tq2-l12+rot", "k_proj": "int4-g16", "v_proj": "int4-g16", "down_proj": "aq2x8-d8"}
"""Formats of one layer's matrices: what the interpreter does in seconds."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def few(matrix: Matrix) -> str | None:
    return FEW.get(matrix.name.rpartition(".")[2]) if ".0." in matrix.name else None


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Runs a function in a process with the interpreter."""
    cache = tmp_path_factory.mktemp("cache")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=interpreted.start, initargs=(cache,)) as pool:
        yield lambda function, *given: pool.submit(function, *given).result(timeout=300)


@pytest.mark.parametrize(("architecture", "settings"), CASES, ids=str)
def test_prompt_and_decode_give_the_logits_of_transformers(
    call: Callable[..., Any], architecture: str, settings: dict[str, object]
) -> None:
    found, expected = call(replays.logits, architecture, settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_positions_shared_out_among_instances(call: Callable[..., Any]) -> None:
    found, expected = call(replays.logits, "gemma3", KINDS, "cpu", "float32", 16)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_packed_matrices(call: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    made = make("llama", tmp_path_factory.mktemp("some"), few)
    found, expected = call(replays.packed_logits, str(made.folder))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize(("architecture", "settings"), CASES, ids=str)
def test_recorded_on_a_gpu(architecture: str, settings: dict[str, object]) -> None:
    for share in (256, 16):
        found, expected = replays.logits(architecture, settings, "cuda", "float32", share)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@needs_gpu
def test_a_text_generated_on_a_gpu_is_that_of_transformers() -> None:
    model = tiny_model("llama").cuda()
    prompt = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3)).cuda()
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, "pad_token_id": 1}
    expected = model.generate(prompt, **settings)
    step = use_step(model).ready()
    for _ in range(2):
        assert torch.equal(model.generate(prompt, **settings), expected)
    assert step.position == prompt.shape[1] + 23
    step.reserve(10)
    with pytest.raises(CacheOverflowError, match="reserve more"):
        step.run(torch.zeros(200, dtype=torch.int64))


@needs_gpu
def test_an_artifact_on_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = make("llama", tmp_path_factory.mktemp("mix"))
    found, expected = replays.packed_logits(str(made.folder), "cuda")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)  # the dense side's products are in tf32 or fp32
    assert generate(made.folder, "one two", max_new_tokens=4, device="cuda")
