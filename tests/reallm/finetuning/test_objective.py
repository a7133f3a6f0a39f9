"""The loss computed in chunks equals its definition, and so does its gradient; which tokens it weighs."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from reallm.finetuning import teacher as teacher_module
from reallm.finetuning.objective import (
    CHUNK,
    Objective,
    head_cross_entropy,
    head_divergence,
    token_losses,
    token_weights,
)
from reallm.finetuning.teacher import Teacher, hidden_state, plain_head
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import LoadedModel
from reallm.runtime.convert import pack_linear


def random_normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher_of(model: PreTrainedModel) -> Teacher:
    loaded = LoadedModel(model, None, "nowhere", "", torch.float32, (), ())
    return Teacher(loaded, torch.arange(15)[None], torch.device("cpu"), torch.float32)


def definition(model: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    p, q = teacher.double().softmax(-1), model.double().softmax(-1)
    return ((p * (p / q).log()).sum(-1) * weights).sum()


def test_token_losses_are_kl_from_the_teacher() -> None:
    model, teacher = random_normal(2, 5, 11, seed=0, scale=4), random_normal(2, 5, 11, seed=1, scale=4)
    computed = token_losses(model.float(), teacher.float()).mean()
    # float32 logarithms of size up to 30, each within 2^-24 of itself, weighed by probabilities that add up to one
    assert float(computed) == pytest.approx(float(definition(model, teacher, torch.tensor(0.1))), abs=2 * 30 * 2.0**-23)


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 3])
def test_head_divergence_and_its_gradient_are_those_of_the_definition(tokens: int) -> None:
    hidden, teacher = random_normal(1, tokens, 6, seed=2), random_normal(1, tokens, 8, seed=3)
    head, teacher_head = random_normal(13, 6, seed=4), random_normal(13, 8, seed=5)
    weights = random_normal(1, tokens, seed=6).softmax(-1)
    exact = hidden.clone().requires_grad_()
    expected = definition(exact @ head.T, teacher @ teacher_head.T, weights)
    torch.autograd.backward(expected)
    rounded = hidden.float().requires_grad_()
    computed = head_divergence(rounded, head.float(), teacher.float(), teacher_head.float(), weights.float())
    torch.autograd.backward(3 * computed)
    assert exact.grad is not None and rounded.grad is not None
    # logits of size 20 carry errors of 20 * 8 * 2^-24 = 1e-5; probabilities and the mean over tokens do not enlarge it
    assert float(computed.detach()) == pytest.approx(float(expected.detach()), abs=5e-5)
    torch.testing.assert_close(rounded.grad.double(), 3 * exact.grad, rtol=1e-3, atol=5e-5)


def test_head_cross_entropy_and_its_gradient_are_torchs() -> None:
    hidden, head, labels = (
        random_normal(1, 9, 6, seed=2).float(),
        random_normal(13, 6, seed=4).float(),
        torch.arange(9)[None],
    )
    weights = token_weights(labels, None, "text")
    assert weights[0, -1] == 0 and float(weights.sum()) == pytest.approx(1)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    targets = labels.roll(-1, 1)
    computed = head_cross_entropy(one, head, targets, weights)
    expected = cross_entropy((other @ head.T)[0, :-1], targets[0, :-1])
    torch.autograd.backward([computed, expected])
    torch.testing.assert_close(computed, expected)
    torch.testing.assert_close(one.grad, other.grad)


def test_scored_tokens_weigh_at_the_position_before_them() -> None:
    ids, scored = torch.arange(4)[None], torch.tensor([[True, False, True, True]])
    assert token_weights(ids, scored, "kl").tolist() == [[0, 0.5, 0.5, 0]]
    assert token_weights(ids, None, "kl").tolist() == [[0.25] * 4]


def test_a_head_that_is_more_than_a_matrix_is_not_plain() -> None:
    ids = torch.arange(12)[None]
    assert plain_head(tiny_model("llama"), ids) is not None
    for architecture in ("gemma2", "roberta"):  # capped logits; a head of several layers
        assert plain_head(tiny_model(architecture), ids) is None


def test_a_compressed_head_is_not_plain() -> None:
    """While its factors and scales are trained, it does not multiply by what its weight decodes to."""
    model = tiny_model("llama")
    packed = pack_linear(model.get_output_embeddings(), Format.parse("int4-g16"), "call", torch.float32, None)
    model.set_output_embeddings(packed)
    assert plain_head(model, torch.arange(12)[None]) is None


@pytest.mark.parametrize("loss", ["kl", "text"])
def test_the_loss_from_hidden_states_equals_the_loss_from_logits(loss: str) -> None:
    model, teacher = tiny_model("llama", seed=1), teacher_of(tiny_model("llama", seed=2))
    ids, scored = torch.arange(40).view(2, 20), (torch.arange(40) % 3 == 0).view(2, 20)
    objective = Objective(model, teacher, ids[:1], "kl" if loss == "kl" else "text")
    assert objective.head is not None and teacher.head is not None
    fast = objective(ids, [0, 1], scored)
    objective.head = None
    torch.testing.assert_close(fast, objective(ids, [0, 1], scored), rtol=1e-4, atol=1e-6)


def test_cached_states_run_the_model_once_per_window() -> None:
    model = tiny_model("llama")
    states, ids = teacher_of(model).hidden_states, torch.arange(30).view(2, 15)
    first = states(ids, [4, 7])
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()  # another run of the model would show
    torch.testing.assert_close(states(ids[1:], [7]), first[1:])
    assert not torch.equal(states(ids[:1], [5]), first[:1])
    assert hidden_state(model, ids).shape == first.shape


def test_all_states_are_cached_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.arange(60).view(4, 15)
    teacher = teacher_of(model)
    assert teacher.cache_all(ids, [3, 1, 4, 9]) and set(teacher.cached) == {3, 1, 4, 9}
    torch.testing.assert_close(teacher.cached[4], hidden_state(model, ids[2:3])[0])
    monkeypatch.setattr(teacher_module, "CACHE_BYTES", 3 * teacher.cached[3].nbytes)
    few = teacher_of(model)
    assert not few.cache_all(ids, [3, 1, 4, 9]) and few.cache_all(ids[:3], [3, 1, 4])
