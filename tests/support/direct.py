"""Statistics by plain autograd on a whole model in float64, the reference for the streaming calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor, nn

from reallm.models.loaded import LoadedModel, discover

Uses = list[tuple[str, Tensor, Tensor]]
"""(matrix name, input [tokens, K], output that keeps its gradient)."""


def loaded_tiny(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A tiny model as `load_model` would return it."""
    model = tiny_model(architecture, seed, dtype)
    blocks, matrices = discover(model)
    return LoadedModel(model, tiny_tokenizer(), architecture, f"{architecture}-{seed}", dtype, blocks, matrices)


def direct_statistics(loaded: LoadedModel, inputs: Tensor, labels: Tensor, scored: Tensor) -> dict[str, Tensor]:
    """The sums of all statistics by "<kind>/<matrix name>", float64, not divided by the number of tokens.

    The loss is the cross-entropy of `labels`, summed where `scored` is true; all arguments are [windows, seqlen].
    """
    model = copy.deepcopy(loaded.model).double()
    sums: dict[str, Tensor] = {}
    for window in range(len(inputs)):
        uses, embedded = Uses(), list[tuple[Tensor, Tensor]]()
        handles = _watch(loaded, model, uses, embedded)
        logits = model(input_ids=inputs[window : window + 1]).logits[0]
        chosen = scored[window]
        nn.functional.cross_entropy(logits[chosen], labels[window][chosen], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        _add_uses(loaded, uses, sums)
        for ids, output in embedded:
            name = next(m.name for m in loaded.matrices if m.kind == "embedding")
            table = torch.zeros_like(model.get_input_embeddings().weight)
            scale = getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
            squares = (scale * output.grad.reshape(-1, table.shape[1])).square()
            _add(sums, f"lookup/{name}", table.detach().index_add_(0, ids.reshape(-1), squares))
    return sums


def _watch(loaded: LoadedModel, model: nn.Module, uses: Uses, embedded: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """Record all uses of matrices and look-ups of `model` in `uses` and `embedded`; returns the hooks' handles."""
    handles: list[Any] = []

    def linear(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.retain_grad()
            uses.append((name, args[0].detach(), output))

        return hook

    def lookup(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        embedded.append((args[0], output))

    for matrix in loaded.matrices:
        if matrix.kind == "embedding":
            handles.append(model.get_input_embeddings().register_forward_hook(lookup))
        if matrix.kind != "expert":
            names = matrix.tied if matrix.kind == "embedding" else (matrix.parameter,)
            for name in names:
                module = model.get_submodule(name.rpartition(".")[0])
                handles.append(module.register_forward_hook(linear(matrix.name)))
    for name in sorted({m.parameter.rpartition(".")[0] for m in loaded.matrices if m.kind == "expert"}):
        module = model.get_submodule(name)
        module.forward = naive_experts(module, name, uses)
    return handles


def naive_experts(module: Any, name: str, uses: Uses) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward that computes experts token by token, down(act(gate x) * up x), and records every product in `uses`."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                x = hidden[token : token + 1]
                both = x @ module.gate_up_proj[expert].T
                both.retain_grad()
                gate, up = both.chunk(2, dim=-1)
                middle = module.act_fn(gate) * up
                out = middle @ module.down_proj[expert].T
                out.retain_grad()
                uses.append((f"{name}.gate_up_proj.{expert}", x.detach(), both))
                uses.append((f"{name}.down_proj.{expert}", middle.detach(), out))
                result[token] = result[token] + (out * weight)[0]
        return result

    return forward


def _add_uses(loaded: LoadedModel, uses: Uses, sums: dict[str, Tensor]) -> None:
    """Add the statistics of all recorded products to `sums`."""
    by_name = {m.name: m for m in loaded.matrices}
    for name, value, output in uses:
        matrix = by_name[name]
        x = value.reshape(-1, matrix.cols)
        g2 = output.grad.reshape(-1, matrix.rows).square()
        _add(sums, f"guided/{name}", (x * g2.mean(1, keepdim=True)).T @ x)
        _add(sums, f"fisher/{name}", g2.T @ x.square())
        if matrix.kind in ("linear", "expert"):
            gradient = output.grad.reshape(-1, matrix.rows)
            _add(sums, f"gram/{name}", (gradient * x.square().mean(1, keepdim=True)).T @ gradient)
        if matrix.kind in ("head", "embedding"):
            _add(sums, f"row_weight/{name}", g2.sum(0))


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value.detach().clone()
