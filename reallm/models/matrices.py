"""Where the weight matrices of a transformers model are, found by class and shape and not by a list of names.

A matrix is W[rows, cols] = [out_features, in_features]: every nn.Linear, every Conv1D (GPT-2's, stored transposed), the
token embedding, the output head, and every slice of a 3-D stack of experts. Fused projections (qkv, gate_up) are one
matrix, and so is a tensor tied to several names. Norms, biases, positions, routers and convolutions are no matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.planner.tables.measured_table import Kind, MatrixRecord

from .probe import Uses, probe


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a loaded model and where it sits."""

    name: str
    """Module path; for an expert the parameter's path and its index: `model.layers.0.mlp.experts.down_proj.3`."""
    parameter: str
    """Name in the model's state dict; all experts of a stack have the same."""
    rows: int
    cols: int
    kind: Kind
    transposed: bool
    """Stored [in, out] (Conv1D, some expert stacks)."""
    block: int | None
    """Index into the model's blocks, or None outside them."""
    input: str
    """Name of the distinct input: the first matrix that reads it; a tied embedding's is its head, else it is empty."""
    family: str
    """Its role across blocks: the name without block and expert numbers, e.g. `self_attn.q_proj`."""
    expert: int | None
    tied: tuple[str, ...]
    """Other parameter names that are this very tensor."""
    source_bytes: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def record(self) -> MatrixRecord:
        """What `measure` writes of it into its table."""
        return MatrixRecord(
            name=self.name,
            rows=self.rows,
            cols=self.cols,
            kind=self.kind,
            block=self.block,
            input=self.input,
            family=self.family,
            source_bytes=self.source_bytes,
        )


@dataclass(frozen=True)
class _Place:
    """A weight tensor, 2-D or a 3-D stack, before its uses are known; `path` is the module's, or the stack's own."""

    path: str
    parameter: str
    tensor: Tensor
    kind: Kind
    module: nn.Module


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the repeated blocks, in order: the children of the ModuleList that holds most parameters.

    Most models have children of one class there; hybrid ones (attention and state space) may mix two.
    """
    best, blocks = 0, tuple[str, ...]()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best:
                best, blocks = size, tuple(f"{path}.{index}" for index in range(len(module)))
    return blocks


def discover(model: PreTrainedModel) -> tuple[tuple[str, ...], tuple[Matrix, ...]]:
    """Module paths of the blocks, and every weight matrix in module order.

    Runs one forward of a few tokens (see `probe`). Raises UserError when the model cannot be run on token ids alone.
    """
    blocks = find_blocks(model)
    head = model.get_output_embeddings()
    places = list(_places(model, head))
    stacks = {place.path: place.tensor for place in places if place.kind == "expert"}
    watched = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    uses = probe(model, watched, stacks)
    known = [place for place in places if place.kind != "expert" or _is_known(place, uses)]
    names = _names_of_tensors(model)
    inputs = _input_names(known, uses, blocks)
    head_path = next((path for path, module in model.named_modules() if module is head), "")
    for place in known:
        if place.kind == "embedding":
            tied_head = isinstance(head, nn.Linear) and head.weight is place.tensor
            inputs[place.path] = head_path if tied_head else ""
    numbered = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    matrices: list[Matrix] = []
    for place in known:
        block = _block_of(place.path, blocks)
        family = _family(place.path, "" if block is None else blocks[block], numbered)
        tied = tuple(name for name in names[id(place.tensor)] if name != place.parameter)
        matrices += _slices(place, uses, inputs[place.path], block, family, tied)
    return blocks, tuple(matrices)


def _places(model: PreTrainedModel, head: nn.Module | None) -> Iterator[_Place]:
    """Every weight tensor once: the embedding owns a tensor tied to it, else the first module that has it."""
    embedding = model.get_input_embeddings()
    owned = {id(embedding.weight)} if isinstance(embedding, nn.Embedding) else set()
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            yield _Place(path, f"{path}.weight", module.weight, "embedding", module)
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in owned:
            owned.add(id(module.weight))
            yield _Place(path, f"{path}.weight", module.weight, "head" if module is head else "linear", module)
        elif not isinstance(module, _ConvNd):
            for name, tensor in module.named_parameters(recurse=False):
                if tensor.ndim == 3 and tensor.is_floating_point() and id(tensor) not in owned:
                    owned.add(id(tensor))
                    yield _Place(f"{path}.{name}", f"{path}.{name}", tensor, "expert", module)


def _is_known(stack: _Place, uses: Uses) -> bool:
    """Whether a 3-D parameter is a stack of matrices: used as one, or declared one by transformers."""
    return stack.path in uses.transposed or hasattr(stack.module, "is_transposed")


def _names_of_tensors(model: nn.Module) -> dict[int, list[str]]:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _block_of(path: str, blocks: tuple[str, ...]) -> int | None:
    return next((index for index, block in enumerate(blocks) if path.startswith(block + ".")), None)


def _input_names(places: list[_Place], uses: Uses, blocks: tuple[str, ...]) -> dict[str, str]:
    """Path -> path of the first in the same block whose input is the same; itself if the forward did not use it."""
    first: dict[tuple[int | None, str], str] = {}
    names = {}
    for place in places:
        key = (_block_of(place.path, blocks), uses.inputs.get(place.path, f"unused:{place.path}"))
        names[place.path] = first.setdefault(key, place.path)
    return names


def _slices(
    place: _Place, uses: Uses, source: str, block: int | None, family: str, tied: tuple[str, ...]
) -> Iterator[Matrix]:
    """The matrices of one tensor: itself, or every expert of a stack."""
    if place.kind == "expert":
        transposed = uses.transposed.get(place.path, bool(getattr(place.module, "is_transposed", False)))
        experts: list[int | None] = list(range(place.tensor.shape[0]))
    else:
        transposed, experts = isinstance(place.module, Conv1D), [None]
    first, second = place.tensor.shape[-2:]
    rows, cols = (second, first) if transposed else (first, second)
    for expert in experts:
        suffix = "" if expert is None else f".{expert}"
        yield Matrix(
            name=place.path + suffix,
            parameter=place.parameter,
            rows=rows,
            cols=cols,
            kind=place.kind,
            transposed=transposed,
            block=block,
            input=source + suffix,
            family=family,
            expert=expert,
            tied=tied,
            source_bytes=rows * cols * place.tensor.element_size(),
        )


def _family(path: str, block: str, numbered: set[str]) -> str:
    """`path` inside its block, without the places in a ModuleList (`experts.3.w1` -> `experts.w1`)."""
    parts = path.split(".")
    kept = [part for i, part in enumerate(parts) if ".".join(parts[:i]) not in numbered]
    outside = [part for i, part in enumerate(block.split(".")) if ".".join(block.split(".")[:i]) not in numbered]
    return ".".join(kept[len(outside) :] if block else kept)
