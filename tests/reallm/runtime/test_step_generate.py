"""`generate` through the compiled step: the same texts as through transformers' loop, and that loop for the rest."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from artifacts import MIX, Made, make
from tiny import VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import reallm
from reallm.codegen.cpu import compiler as native
from reallm.models.loaded import Matrix
from reallm.runtime.generate import generate
from reallm.runtime.step.cpu import Step, compile_step
from reallm.runtime.step.generate import StepGenerate, use_step

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="no C++ compiler here")
PROMPT = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 1}


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny llama whose `generate` uses the step."""
    result = tiny_model("llama")
    use_step(result)
    return result


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of a step read."""
    counts: list[int] = []
    run = Step.run

    def counting(self: Step, tokens: Tensor) -> Tensor:
        counts.append(tokens.numel())
        return run(self, tokens)

    monkeypatch.setattr(Step, "run", counting)
    yield counts


def drawn(model: PreTrainedModel, **settings: Any) -> Tensor:
    """What generate adds to PROMPT, with the same random numbers every time."""
    torch.manual_seed(5)
    return model.generate(PROMPT, **SETTINGS | settings)[0, PROMPT.shape[1] :]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 5, "top_p": 0.8},
        {"repetition_penalty": 1.5},
        {"eos_token_id": list(range(40, 120))},
        {"min_new_tokens": 3, "eos_token_id": list(range(100))},
        {"attention_mask": torch.ones_like(PROMPT)},
    ],
    ids=str,
)
def test_the_text_is_that_of_transformers(settings: dict[str, Any], model: PreTrainedModel, steps: list[int]) -> None:
    expected = drawn(tiny_model("llama"), **settings)
    assert torch.equal(drawn(model, **settings), expected)
    assert steps == [PROMPT.shape[1]] + [1] * (len(expected) - 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "beam"),
        ({"return_dict_in_generate": True, "output_scores": True}, "return_dict_in_generate"),
        ({"use_cache": False}, "use_cache is off"),
        ({"attention_mask": torch.tensor([[0, 0] + [1] * 7])}, "masked"),
    ],
    ids=str,
)
def test_what_the_step_cannot_do_goes_the_old_way_and_says_so_once(
    settings: dict[str, Any],
    reason: str,
    model: PreTrainedModel,
    steps: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = tiny_model("llama").generate(PROMPT, **SETTINGS | settings)
    with caplog.at_level(logging.WARNING):
        found = [model.generate(PROMPT, **SETTINGS | settings) for _ in range(2)]
    for each in found:
        sequences = (expected, each) if isinstance(each, Tensor) else (expected.sequences, each.sequences)
        assert torch.equal(*sequences)
    said = [record.message for record in caplog.records if record.name.startswith("reallm")]
    assert len(said) == 1 and reason in said[0]
    assert not steps


def test_a_tokenizer_is_only_needed_for_stop_strings(
    model: PreTrainedModel, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = drawn(tiny_model("llama"))
    assert torch.equal(drawn(model, tokenizer=tiny_tokenizer()), expected) and steps
    steps.clear()
    stop = tiny_tokenizer().decode(expected[2])
    stopped = drawn(model, tokenizer=tiny_tokenizer(), stop_strings=[stop])
    assert not steps and len(stopped) <= 3 and "generate(tokenizer=...)" in caplog.text


def test_several_texts_at_once_go_the_old_way(model: PreTrainedModel, steps: list[int]) -> None:
    both = PROMPT.expand(2, -1)
    assert torch.equal(model.generate(both, **SETTINGS), tiny_model("llama").generate(both, **SETTINGS))
    assert not steps


def test_another_architecture_goes_the_old_way_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("phi3")
    use_step(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(drawn(model), drawn(tiny_model("phi3")))
    assert "Phi3ForCausalLM is not among the supported architectures" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_only_the_step_takes_all_threads_while_tokens_are_drawn(fails: bool, model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []

    def watch(_: Tensor, scores: Tensor) -> Tensor:
        seen.append((torch.get_num_threads(), use_step(model).ready().threads))
        if fails:
            raise ValueError("enough")
        return scores

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(ValueError, match="enough") if fails else nullcontext():
            drawn(model, logits_processor=[watch])
        assert seen == [(1, 3)] * (1 if fails else 12)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_streamer_gets_every_token(model: PreTrainedModel) -> None:
    class Streamer:
        got: list[int] = []  # noqa: RUF012 - one instance
        ended = False

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    output = model.generate(PROMPT, streamer=streamer, **SETTINGS)
    assert streamer.got == output[0].tolist() and streamer.ended


def change_norm(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(3)


def change_matrix(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-2)


def replace_matrix(model: PreTrainedModel) -> None:
    torch.manual_seed(0)
    model.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(torch.randn(48, 48))


def cast(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [change_norm, change_matrix, replace_matrix, cast])
def test_a_changed_model_is_not_answered_from_old_weights(
    change: Callable[[PreTrainedModel], None], model: PreTrainedModel
) -> None:
    drawn(model)
    other = tiny_model("llama")
    for each in (model, other):
        change(each)
    assert torch.equal(drawn(model), drawn(other))


def test_training_and_hooks_end_the_use_of_the_step(model: PreTrainedModel, steps: list[int]) -> None:
    drawn(model)
    steps.clear()
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    drawn(model)
    assert not steps
    handle.remove()
    drawn(model)
    assert steps


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_by_itself(
    copied: Callable[[PreTrainedModel], PreTrainedModel], model: PreTrainedModel
) -> None:
    expected = drawn(model)
    other = copied(model)
    change_norm(model)
    assert isinstance(other.generate, StepGenerate) and other.generate.model is other
    assert torch.equal(drawn(other), expected)


TURNS = {f"{architecture}-{turn}": (architecture, turn) for architecture in ("llama", "gemma3") for turn in (0, 4)}


@pytest.fixture(scope="module", params=TURNS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Artifacts whose matrices have the formats of MIX in turn, from another start."""
    architecture, turn = TURNS[request.param]
    formats = iter(2 * (MIX[turn:] + MIX[:turn]))

    def choose(matrix: Matrix) -> str | None:
        return next(formats)

    return make(architecture, tmp_path_factory.mktemp("made"), choose)


def test_an_artifact_of_all_kinds_of_formats_gives_the_logits_of_its_decoded_weights(made: Made) -> None:
    model, _ = reallm.load(made.folder)
    step = compile_step(model)
    step.reserve(PROMPT.shape[1] + 1)
    with torch.no_grad():
        expected = made.replaced()(PROMPT).logits[0]
    # float32 on both sides, values of size 1: rotations and factors add three more roundings a product to those of
    # test_step.TOLERANCE, and codes of random scales make logits a few times larger
    largest = float(expected.abs().max())
    torch.testing.assert_close(step.run(PROMPT[0, :8]), expected[7], rtol=0, atol=1e-4 * max(largest, 1))
    torch.testing.assert_close(step.run(PROMPT[0, 8:]), expected[8], rtol=0, atol=1e-4 * max(largest, 1))


def test_from_pretrained_uses_the_step_as_well(made: Made, steps: list[int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    drawn(model)
    assert len(steps) == SETTINGS["max_new_tokens"]


def test_the_command_uses_the_step_and_gives_the_text_of_float32(made: Made, steps: list[int]) -> None:
    text = generate(made.folder, "abc", max_new_tokens=5)
    assert steps
    steps.clear()
    assert generate(made.folder, "abc", max_new_tokens=5, dtype="float32") == text


@pytest.fixture
def nothing_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("REALLM_NATIVE", "off")
    for built in (native.library, native.generated_library):
        built.cache_clear()
    yield
    for built in (native.library, native.generated_library):
        built.cache_clear()


def test_the_command_does_without_native_code(made: Made, request: pytest.FixtureRequest) -> None:
    text = generate(made.folder, "abc", max_new_tokens=5)
    request.getfixturevalue("nothing_native")
    assert generate(made.folder, "abc", max_new_tokens=5) == text
