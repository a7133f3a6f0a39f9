"""The weight matrices of a transformers model, found by class and shape instead of by a list of names.

A matrix is W[rows, cols] = [out_features, in_features]. These count as matrices: every nn.Linear, every Conv1D
(GPT-2's, stored transposed), every embedding of the token ids, the output head, and every slice of a 3-D stack of
experts. A fused projection (qkv, gate_up) is one matrix, and so is an embedding with the heads tied to it. Norms,
biases, position embeddings, routers, convolutions and weights tied in any other way do not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.planner.tables.measured_table import Kind

from .matrix import Matrix
from .probe import Uses, probe


@dataclass(frozen=True)
class _WeightTensor:
    """A weight tensor, 2-D or a 3-D stack of experts, before the probe has shown how the model uses it."""

    path: str
    """Path of the module; for a stack, path of the parameter."""
    parameter: str
    tensor: Tensor
    kind: Kind
    module: nn.Module
    is_input: bool = False
    """Whether it is the model's first embedding."""


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the repeated blocks, in module order: the children of every outermost ModuleList of blocks.

    A vision-language model has several such lists, hybrid models (attention and state space) have blocks of several
    classes. A child counts as a block if it contains a linear layer; a bare linear layer is not a block.
    """
    blocks: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{block}.") for block in blocks):
            blocks += [f"{path}.{index}" for index, child in enumerate(module) if _is_block(child)]
    return tuple(blocks)


def _is_block(module: nn.Module) -> bool:
    """Whether a module contains a matrix, without being one."""
    return any(isinstance(child, (nn.Linear, Conv1D)) for child in module.modules() if child is not module)


def discover(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[Matrix, ...]]:
    """Find the blocks and matrices of `model`: (module paths of the blocks, all weight matrices in module order).

    Runs one forward pass of a few tokens (see `probe`). Raises UserError if the model needs more inputs than token ids.
    """
    blocks = find_blocks(model)
    head = model.get_output_embeddings()
    candidates = list(_weight_tensors(model, head))
    stacks = {candidate.path: candidate.tensor for candidate in candidates if candidate.kind == "expert"}
    watched = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    uses = probe(model, watched, stacks)
    routers = _routers(model)
    names = _names_of_tensors(model)
    weights = [
        weight
        for weight in candidates
        if weight.path not in routers
        and _is_used_as_matrices(weight, uses)
        and _can_share(model, weight, names[id(weight.tensor)])
    ]
    inputs = _input_names(weights, uses, blocks)
    head_path = next((path for path, module in model.named_modules() if module is head), "")
    for weight in weights:
        if weight.kind == "embedding":
            tied_head = isinstance(head, nn.Linear) and head.weight is weight.tensor
            inputs[weight.path] = head_path if tied_head else ""
    numbered = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    matrices: list[Matrix] = []
    for weight in weights:
        block = _block_of(weight.path, blocks)
        family = _family(weight.path, "" if block is None else blocks[block], numbered)
        tied = tuple(name for name in names[id(weight.tensor)] if name != weight.parameter)
        matrices += _slices(weight, uses, inputs[weight.path], block, family, tied)
    return blocks, tuple(matrices)


def _weight_tensors(model: PreTrainedModel, head: nn.Module | None) -> Iterator[_WeightTensor]:
    """Yield every weight tensor once; a tied one belongs to the embedding if that uses it, else to its first user."""
    embedding = _input_embeddings(model)
    owned = {id(embedding.weight)} if isinstance(embedding, nn.Embedding) else set()
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            yield _WeightTensor(path, f"{path}.weight", module.weight, "embedding", module, is_input=True)
        elif isinstance(module, nn.Embedding) and id(module.weight) not in owned:
            owned.add(id(module.weight))
            yield _WeightTensor(path, f"{path}.weight", module.weight, "embedding", module)
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in owned:
            owned.add(id(module.weight))
            if module.weight.dtype == torch.float32 != model.dtype:
                continue  # the model's class protects it from rounding, so it is stored as it is
            yield _WeightTensor(path, f"{path}.weight", module.weight, "head" if module is head else "linear", module)
        elif not isinstance(module, _ConvNd):
            for name, tensor in module.named_parameters(recurse=False):
                if tensor.ndim == 3 and tensor.is_floating_point() and id(tensor) not in owned:
                    owned.add(id(tensor))
                    yield _WeightTensor(f"{path}.{name}", f"{path}.{name}", tensor, "expert", module)


def _is_used_as_matrices(weight: _WeightTensor, uses: Uses) -> bool:
    """Whether the probe saw a tensor used like its kind.

    A 3-D parameter counts if it is multiplied as a stack of matrices, or if transformers declares it so; an embedding
    besides the model's first one counts if token ids are looked up in it.
    """
    if weight.kind == "expert":
        return weight.path in uses.transposed or hasattr(weight.module, "is_transposed")
    return weight.kind != "embedding" or weight.is_input or weight.tensor.data_ptr() in uses.token_lookups


def _can_share(model: nn.Module, weight: _WeightTensor, names: list[str]) -> bool:
    """Whether a packed weight can be used under all its `names`: only an embedding, and only by linear layers."""
    others = [name for name in names if name != weight.parameter]
    users = [model.get_submodule(name.rpartition(".")[0]) for name in others]
    return not users or (weight.kind == "embedding" and all(isinstance(user, nn.Linear) for user in users))


def _routers(model: nn.Module) -> frozenset[str]:
    """Paths of the linear layers that choose experts: of a class named so, or with one output for every expert."""
    routers = set()
    for path, module in model.named_modules():
        counts = {len(child) for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1}
        counts |= {
            parameter.shape[0]
            for child in module.children()
            for parameter in child.parameters(recurse=False)
            if parameter.ndim == 3 and hasattr(child, "is_transposed")
        }
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                named = type(child) is not nn.Linear and "router" in type(child).__name__.lower()
                chooses = child.out_features in counts and name in ("gate", "router", "gating", "classifier")
                if named or chooses:
                    routers.add(f"{path}.{name}" if path else name)
    return frozenset(routers)


def _input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        embedding: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding


def _names_of_tensors(model: nn.Module) -> dict[int, list[str]]:
    """id() of each parameter -> all its names."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _block_of(path: str, blocks: tuple[str, ...]) -> int | None:
    """Index of the block that contains the module at `path`; None if no block contains it."""
    return next((index for index, block in enumerate(blocks) if path.startswith(block + ".")), None)


def _input_names(weights: list[_WeightTensor], uses: Uses, blocks: tuple[str, ...]) -> dict[str, str]:
    """Path of each tensor -> path of the first tensor in the same block with the same input.

    A tensor that the probe did not use maps to itself.
    """
    first: dict[tuple[int | None, str], str] = {}
    names = {}
    for weight in weights:
        key = (_block_of(weight.path, blocks), uses.inputs.get(weight.path, f"unused:{weight.path}"))
        names[weight.path] = first.setdefault(key, weight.path)
    return names


def _slices(
    weight: _WeightTensor, uses: Uses, source: str, block: int | None, family: str, tied: tuple[str, ...]
) -> Iterator[Matrix]:
    """The matrices of one tensor: a single one, or one per expert of a stack."""
    if weight.kind == "expert":
        transposed = uses.transposed.get(weight.path, bool(getattr(weight.module, "is_transposed", False)))
        experts: list[int | None] = list(range(weight.tensor.shape[0]))
    else:
        transposed, experts = isinstance(weight.module, Conv1D), [None]
    first, second = weight.tensor.shape[-2:]
    rows, cols = (second, first) if transposed else (first, second)
    for expert in experts:
        suffix = "" if expert is None else f".{expert}"
        yield Matrix(
            name=weight.path + suffix,
            parameter=weight.parameter,
            rows=rows,
            cols=cols,
            kind=weight.kind,
            transposed=transposed,
            block=block,
            input=source + suffix,
            family=family,
            expert=expert,
            tied=tied,
            source_bytes=rows * cols * weight.tensor.element_size(),
        )


def _family(path: str, block: str, numbered: set[str]) -> str:
    """The path relative to its block, without indices into a ModuleList (`experts.3.w1` -> `experts.w1`)."""
    parts = path.split(".")
    named = [part for i, part in enumerate(parts) if ".".join(parts[:i]) not in numbered]
    outside = [part for i, part in enumerate(block.split(".")) if ".".join(block.split(".")[:i]) not in numbered]
    return ".".join(named[len(outside) :] if block else named)
