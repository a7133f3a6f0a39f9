"""Statistics of models whose blocks are not a plain chain, against float64 autograd on the whole model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from architectures.build import tiny_model as architecture_model
from architectures.cases import select
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from torch import Tensor, nn

from reallm.calibration.block_streaming import BlockStreamer
from reallm.calibration.calibrate import calibrate
from reallm.calibration.objective import Objective
from reallm.calibration.statistics import statistics_path
from reallm.models.loaded import LoadedModel, discover
from reallm.models.probe import eager_experts

SEED = 3
WINDOWS = torch.randint(5, 255, (2, 20), generator=torch.Generator().manual_seed(1))
STREAMED = (
    "gemma4_text",  # inputs per layer from outside the blocks
    "gemma4_text+shared-kv",  # keys and values that one block writes and others read
    "gemma3n_text",  # four streams of hidden states
    "openai-gpt",  # blocks that take and return lists
    "zamba2",  # the embeddings' output goes to every block
    "ctrl",  # an in-place operation on the embeddings
    "phimoe",  # routers that return tuples
)
MAMBA = "mamba"


def load(name: str) -> LoadedModel:
    (case,) = [case for case in select([name]) if case.name == name]
    model = architecture_model(case).float().eval()
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = 0
    blocks, matrices = discover(model)
    return LoadedModel(model, tiny_tokenizer(), name, name, torch.float32, blocks, matrices)


def stored(folder: Path, loaded: LoadedModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for block in {m.block for m in loaded.matrices}:
        tensors |= load_file(statistics_path(folder, block))
    return tensors


def direct(loaded: LoadedModel) -> dict[str, Tensor]:
    """H_guided of every linear layer that is called, by plain autograd in float64."""
    model, sums = copy.deepcopy(loaded.model).double(), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(SEED)
    linears = {m.name for m in loaded.matrices if m.kind in ("linear", "head")}
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_().clone())
    for window in WINDOWS:
        uses: list[tuple[str, Tensor, Tensor]] = []

        def hook(name: str, uses: list[tuple[str, Tensor, Tensor]] = uses):
            def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                x = args[0].detach()

                def receive(gradient: Tensor) -> None:  # of the output itself, even if the model scales it in place
                    uses.append((name, x, gradient))

                if output.requires_grad:
                    output.register_hook(receive)

            return keep

        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in linears]
        with torch.no_grad(), eager_experts(loaded.model):
            logits = loaded.model(input_ids=window[None]).logits[0]
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        with eager_experts(model):
            scores = model(input_ids=window[None]).logits[0]
        for handle in handles:
            handle.remove()
        nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
        for name, x, output_gradient in uses:
            g2 = output_gradient.reshape(-1, output_gradient.shape[-1]).square().mean(1, keepdim=True)
            rows = x.reshape(-1, x.shape[-1])
            sums[name] = sums.get(name, 0) + (rows * g2).T @ rows / WINDOWS.numel()
    return sums


@pytest.mark.parametrize("name", [*STREAMED, MAMBA])
def test_statistics_equal_plain_autograd(name: str, tmp_path: Path) -> None:
    loaded = load(name)
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    assert not any("whole model" in note for note in report.notes), report.notes
    actual, expected = stored(tmp_path, loaded), direct(loaded)
    assert len(expected) > 2
    for matrix, value in expected.items():
        if float(value.max()) == 0.0:
            continue
        found = actual[f"guided/{matrix}"].double()
        assert torch.allclose(found, value, rtol=1e-3, atol=2e-4 * float(value.max())), matrix


def test_a_weight_used_without_calling_its_layer_is_measured(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj.weight itself: H from the products that autograd sees in float64."""
    loaded = load(MAMBA)
    calibrate(loaded, WINDOWS[:1], tmp_path, seed=SEED)
    name = next(m.name for m in loaded.matrices if m.name.endswith("dt_proj"))
    model = copy.deepcopy(loaded.model).double()
    layer = model.get_submodule(name)
    products: list[tuple[Tensor, Tensor]] = []
    real = Tensor.__matmul__

    def matmul(left: Tensor, right: Tensor) -> Tensor:
        output = real(left, right)
        if left is layer.weight:
            output.retain_grad()
            products.append((right.detach(), output))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__matmul__", matmul)
        scores = model(input_ids=WINDOWS[:1]).logits[0]
    with torch.no_grad():
        logits = loaded.model(input_ids=WINDOWS[:1]).logits[0]
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(SEED))[:, 0]
    nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    ((right, output),) = products
    x, g = right[0].T, output.grad[0].T
    expected = (x * g.square().mean(1, keepdim=True)).T @ x / WINDOWS[:1].numel()
    found = stored(tmp_path, loaded)[f"guided/{name}"].double()
    assert torch.allclose(found, expected, rtol=1e-3, atol=2e-4 * float(expected.max()))


def test_every_slice_of_a_stack_multiplied_at_once_is_measured(tmp_path: Path) -> None:
    loaded = load("llama4_text")
    report = calibrate(loaded, WINDOWS, tmp_path, seed=SEED)
    experts = [m.name for m in loaded.matrices if m.kind == "expert"]
    assert experts and not set(experts) & set(report.kept)
    actual = stored(tmp_path, loaded)
    # The squares of a row's gradient times the input's, summed over rows, are the diagonal of N * H_guided.
    for name in experts:
        rows = next(m.rows for m in loaded.matrices if m.name == name)
        fisher = actual[f"fisher/{name}"].double().sum(0)
        assert torch.allclose(fisher, rows * actual[f"guided/{name}"].double().diagonal(), rtol=0.02)
        assert bool(fisher.any())


def test_a_chain_is_recognised(tmp_path: Path) -> None:
    for name, expected in (("llama", True), ("gemma4_text", False), ("zamba2", False)):
        loaded = load(name)
        objective = Objective(loaded, WINDOWS[:1], SEED)
        loaded.model.requires_grad_(False)
        streamer = BlockStreamer(loaded, tmp_path / name, objective)
        streamer.store_results()
        assert streamer.is_chain == expected
