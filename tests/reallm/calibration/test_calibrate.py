"""The streaming calibration equals plain autograd on the whole model, resumes, and refuses what it cannot stream."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from direct import direct_statistics, loaded_tiny
from safetensors.torch import load_file
from tiny import ARCHITECTURES, VOCAB
from torch import Tensor

from reallm.calibration.block_streaming import BlockStreamer, NotReproducedError
from reallm.calibration.calibrate import calibrate
from reallm.calibration.hooks import StatisticsHooks
from reallm.calibration.statistics import read_statistics, statistics_path
from reallm.calibration.stored_tensors import CallResults, StoredGradients
from reallm.errors import UserError
from reallm.measurement.encoding import matrix_metric
from reallm.models.loaded import LoadedModel
from reallm.text.masking import MASK_SHARE

SEED = 3
WINDOWS = torch.randint(
    5, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1)
)  # longer than gemma's sliding window of 32


def labels_of(loaded: LoadedModel) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, labels sampled from the model, where the loss is taken), computed independently of the calibration."""
    inputs, scored = WINDOWS, torch.ones_like(WINDOWS, dtype=torch.bool)
    if loaded.is_encoder:
        scored = torch.rand(WINDOWS.shape, generator=torch.Generator().manual_seed(SEED)) < MASK_SHARE
        scored[:, 0] = True
        inputs = WINDOWS.masked_fill(scored, loaded.tokenizer.mask_token_id)
    generator, labels = torch.Generator().manual_seed(SEED), torch.empty_like(WINDOWS)
    for window in range(len(WINDOWS)):
        with torch.no_grad():
            logits = loaded.model(input_ids=inputs[window : window + 1]).logits[0]
        labels[window] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return inputs, labels, scored


def stored(folder: Path, loaded: LoadedModel) -> dict[str, Tensor]:
    """All statistics in `folder`, by key."""
    tensors: dict[str, Tensor] = {}
    for block in (None, *range(len(loaded.blocks))):
        tensors |= load_file(statistics_path(folder, block))
    return {key: value for key, value in tensors.items() if not key.startswith("count/")}


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_equal_plain_autograd(architecture: str, tmp_path: Path) -> None:
    loaded = loaded_tiny(architecture)
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert report.tokens == WINDOWS.numel() and report.perplexity > 1
    actual, expected = stored(tmp_path, loaded), direct_statistics(loaded, *labels_of(loaded))
    assert set(actual) == set(expected)
    for key, value in expected.items():
        kind = key.split("/", 1)[0]
        value = value / value.mean() if kind == "row_weight" else value / WINDOWS.numel()
        # Float32 against float64: the relative error of a gradient is about 2^-24 times the root of the thousands of
        # operations behind it, 4e-6, and squaring doubles it; allowed is ten times that of the largest entry. bf16
        # rounds each entry by 2^-9.
        rounding = 2.0**-8 if kind in ("fisher", "lookup", "gram") else 0.0
        assert torch.allclose(actual[key].double(), value, rtol=rounding, atol=1e-4 * float(value.max())), key
        assert float(value.max()) > 0, f"{key} is all zero, so nothing was compared"


def test_every_matrix_has_a_metric(tmp_path: Path) -> None:
    for architecture in ("llama", "llama-tied"):
        loaded = loaded_tiny(architecture)
        calibrate(loaded, WINDOWS, tmp_path / architecture, seed=SEED)
        for matrix in loaded.matrices:
            metric = matrix_metric(matrix, read_statistics(tmp_path / architecture, matrix.block, [matrix]))
            assert metric.hessian.shape == (matrix.cols, matrix.cols)
            is_head = matrix.kind == "head" or bool(matrix.tied)
            assert (metric.row_weight is not None) == is_head
            assert (metric.extra_fisher is not None) == (matrix.kind == "embedding")
            assert bool(metric.hessian.any()) == (matrix.kind != "embedding" or is_head)
            if metric.extra_fisher is not None:
                unseen = torch.ones(VOCAB, dtype=torch.bool).index_fill_(0, WINDOWS.unique(), False)
                assert not metric.extra_fisher[unseen].any() and bool(metric.extra_fisher[~unseen].any(1).all())


def test_experts_without_tokens_borrow_the_statistics_of_the_others(tmp_path: Path) -> None:
    loaded = loaded_tiny("mixtral")
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("gate.weight") or "router" in name:
            with torch.no_grad():
                parameter.zero_()  # equal scores: top-k chooses the same two of three experts for every token
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    matrices = [m for m in loaded.matrices if m.kind == "expert"]
    counts = {m.name: load_file(statistics_path(tmp_path, m.block)).get(f"count/{m.name}") for m in matrices}
    empty = [m for m in matrices if counts[m.name] is None]
    assert len(empty) == 4  # gate_up and down of one expert in each of two blocks
    assert any("routed to 4 experts" in note and empty[0].name in note for note in report.notes)
    assert not report.kept
    actual = stored(tmp_path, loaded)
    for matrix in empty:
        others = [m for m in matrices if (m.block, m.family) == (matrix.block, matrix.family) and m != matrix]
        for kind in ("guided", "fisher", "gram"):
            # Two tokens of three go to each of the other two: the average per token is their sum / all their tokens.
            total = sum(actual[f"{kind}/{m.name}"].double() for m in others)
            expected = total / sum(float(counts[m.name]) for m in others)
            found = actual[f"{kind}/{matrix.name}"].double()
            assert torch.allclose(found, expected, rtol=2.0**-8, atol=1e-6 * float(expected.abs().max()))
            assert bool(found.any())


STEPS = ("store_results", "run_tail", "run_call", "run_front")


@pytest.mark.parametrize("stopped_at", [*STEPS, "window", "store", "statistics"])
def test_an_interrupted_pass_resumes_to_the_same_bytes(
    stopped_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_tiny("llama-tied", dtype=torch.bfloat16)
    uninterrupted = calibrate(loaded, WINDOWS, tmp_path / "uninterrupted", seed=SEED)
    calls = 0

    def interrupt(owner: type, name: str, at: int) -> None:
        original = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    owners = {"window": (CallResults, "append"), "store": (StoredGradients, "store")}
    owners["statistics"] = (StatisticsHooks, "statistics")
    owner, name = owners.get(stopped_at, (BlockStreamer, stopped_at))
    interrupt(owner, name, {"window": 5, "run_call": 2, "store": 2, "statistics": 2}.get(stopped_at, 1))
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, WINDOWS, tmp_path / "interrupted", seed=SEED)
    resumed = calibrate(loaded, WINDOWS, tmp_path / "interrupted", seed=SEED)
    assert digests(tmp_path / "interrupted") == digests(tmp_path / "uninterrupted")
    assert replace(resumed, seconds=0.0) == replace(uninterrupted, seconds=0.0)
    assert not (tmp_path / "interrupted" / "partial").exists()


def test_a_finished_pass_is_not_repeated(tmp_path: Path) -> None:
    @contextmanager
    def entered() -> Iterator[None]:
        pytest.fail("statistics are gathered again")
        yield

    loaded = loaded_tiny("llama")
    first = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    loaded.model.register_forward_pre_hook(lambda *_: pytest.fail("the model is run again"))
    assert calibrate(loaded, WINDOWS, tmp_path, seed=SEED, weights=entered()) == first


def test_a_finished_block_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ran = loaded_tiny("llama"), []
    original = BlockStreamer.run_call

    def counted(self: BlockStreamer, number: int, hooks: StatisticsHooks) -> object:
        if ran == [1]:
            ran.append(-1)
            raise KeyboardInterrupt
        ran.append(number)
        return original(self, number, hooks)

    monkeypatch.setattr(BlockStreamer, "run_call", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert ran == [1, -1, 0]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = loaded_tiny("mixtral")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    implementation = loaded.model.get_experts_implementation()
    calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())
    assert not any("forward" in vars(module) for module in loaded.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    assert loaded.model.get_experts_implementation() == implementation


def test_activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight[0, 0] = 3e38
        loaded.model.model.layers[0].mlp.up_proj.weight.mul_(1e20)
    with pytest.raises(UserError, match=r"llama: activations at the output of model\.layers\.0 are NaN or infinite"):
        calibrate(loaded, WINDOWS, tmp_path, seed=SEED)


class _HugeGradient(torch.autograd.Function):
    """The identity function with a gradient that overflows."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    norm = loaded.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda _module, _args, output: _HugeGradient.apply(output))
    with pytest.raises(UserError, match=r"llama: the gradient at the input of model\.layers\.1 is .* infinite"):
        calibrate(loaded, WINDOWS, tmp_path, seed=SEED)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    loaded.model.lm_head.register_forward_hook(lambda _module, _args, output: output.index_fill(-1, _ROW, -torch.inf))
    with pytest.raises(UserError, match=r"llama: its logits are NaN or infinite; check the weights"):
        calibrate(loaded, WINDOWS, tmp_path, seed=SEED)


_ROW = WINDOWS[0, 1:2]


@pytest.mark.parametrize("twist", ["call", "token"])
def test_blocks_that_cannot_be_run_alone_are_run_with_the_whole_model(twist: str, tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    layers = loaded.model.model.layers
    if twist == "call":  # a block whose output changes from call to call
        layers[0].mlp.register_forward_hook(_Counting())
    else:  # a block that depends on another module's last call
        layers[1].mlp.register_forward_hook(_Neighbour(loaded.model, layers[0]))
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert any("whole model at once, because model.layers." in note for note in report.notes)
    actual = stored(tmp_path, loaded)
    names = {m.name for m in loaded.matrices if m.kind == "linear"}
    assert {key.split("/")[1] for key in actual if key.startswith("guided/")} >= names


def test_the_whole_model_at_once_gives_the_same_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in ("llama-tied", "mixtral", "roberta"):
        loaded = loaded_tiny(architecture)
        calibrate(loaded, WINDOWS, tmp_path / architecture / "calls", seed=SEED)
        with monkeypatch.context() as patch:
            patch.setattr(BlockStreamer, "_find_dependencies", _refuse)
            patch.setattr("reallm.calibration.gathering.MEMORY_SHARE", 1e-6)  # one matrix at a time
            calibrate(loaded, WINDOWS, tmp_path / architecture / "whole", seed=SEED)
        expected = stored(tmp_path / architecture / "calls", loaded)
        actual = stored(tmp_path / architecture / "whole", loaded)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.allclose(actual[key], value, rtol=2.0**-7, atol=1e-5 * float(value.abs().max())), key


def _refuse(_streamer: BlockStreamer) -> None:
    raise NotReproducedError("it is asked for")


class _Neighbour:
    """Adds to a module's output what another block computed in the same pass of the model."""

    def __init__(self, model: torch.nn.Module, other: torch.nn.Module) -> None:
        self.seen: Tensor | float = 0.0
        model.register_forward_pre_hook(self.forget)
        other.mlp.register_forward_hook(self.remember)

    def forget(self, _module: object, _args: object) -> None:
        self.seen = 0.0

    def remember(self, _module: object, _args: object, output: Tensor) -> None:
        self.seen = output.detach()

    def __call__(self, _module: object, _args: object, output: Tensor) -> Tensor:
        return output + self.seen


class _Counting:
    """A hook that adds a number that grows with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _module: object, _args: object, output: Tensor) -> Tensor:
        self.calls += 1
        return output + self.calls


def test_memory_holds_the_statistics_of_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, blocks_together = loaded_tiny("llama"), []
    original = StatisticsHooks.__init__

    def noted(self: StatisticsHooks, model: LoadedModel, matrices: list, *rest: object) -> None:
        blocks_together.append({m.block for m in matrices})
        original(self, model, matrices, *rest)

    monkeypatch.setattr(StatisticsHooks, "__init__", noted)
    calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert blocks_together == [{None}, {1}, {0}, {None}]


def test_a_second_process_waits_and_reads_the_result(tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    other = copy.deepcopy(loaded)
    with ThreadPoolExecutor(2) as pool:  # a lock on another open file excludes threads as it does processes
        reports = list(pool.map(lambda one: calibrate(one, WINDOWS, tmp_path, seed=SEED), (loaded, other)))
    assert reports[0] == reports[1]


def test_damaged_statistics_say_what_to_remove(tmp_path: Path) -> None:
    loaded = loaded_tiny("llama")
    calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    path = statistics_path(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path} cannot be read .* measure again"):
        read_statistics(tmp_path, 0, [m for m in loaded.matrices if m.block == 0])
