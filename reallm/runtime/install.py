"""Put packed modules into a model's skeleton: what a record names, in place of the modules that hold it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.errors import UserError
from reallm.kernels.formats.formats import Format

from .input_groups import link_input_groups
from .modules import (
    CompressedEmbedding,
    CompressedLinear,
    ExpertStack,
    PackedExpert,
    pack_embedding,
    pack_linear,
    tie_head,
)
from .packed import DecodeMode, Decoding, Packed, Shared, SharedCodebooks


class _Replacement:
    """One pass over a model; every packed module gets `mode` and computes in `dtype`."""

    def __init__(self, model: PreTrainedModel, record: QuantizationRecord, dtype: torch.dtype) -> None:
        self.model, self.record, self.dtype = model, record, dtype
        self.mode: DecodeMode = record.decode
        self.partial = type(model).__name__ not in (getattr(model.config, "architectures", None) or ())
        self.users = {matrix: key for key, matrices in record.shared.items() for matrix in matrices}
        fields = {key: fmt.shared_field for key, fmt in record.shared_formats().items()}
        self.linears: dict[str, CompressedLinear] = {}
        self.codebooks = SharedCodebooks({key: field for key, field in fields.items() if field})
        if fields:
            model.add_module(SharedCodebooks.NAME, self.codebooks)

    def shared(self, matrix: str) -> Shared:
        key = self.users.get(matrix)
        return None if key is None else (self.codebooks, key)

    def find(self, name: str) -> tuple[str, nn.Module] | None:
        """The module called `name`, with or without the base model's prefix, and its path."""
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            module = _submodule(self.model, candidate)
            if module is not None:
                return candidate, module
        return None

    def require(self, name: str) -> tuple[str, nn.Module] | None:
        """As `find`, but a missing module is an error, unless the model is loaded as another class than it was compiled
        as (a base model has no head).
        """
        found = self.find(name)
        if found is None and not self.partial:
            raise UserError(f"config.json names {name!r}, which {type(self.model).__name__} does not have")
        return found

    def plain(self, matrix: str, fmt: Format) -> None:
        found = self.require(matrix)
        if found is None:
            return
        name, module = found
        if isinstance(module, Conv1D):
            module = _as_linear(module)
            self.model.set_submodule(name, module)
        if isinstance(module, Packed) or not isinstance(module, nn.Linear | nn.Embedding):
            raise UserError(f"config.json packs {matrix!r}, a {type(module).__name__}, which is no linear or embedding")
        if isinstance(module, nn.Linear):
            self.linears[name] = pack_linear(module, fmt, self.mode, self.dtype, self.shared(matrix))
        else:
            pack_embedding(module, fmt, self.mode, self.dtype, self.shared(matrix))

    def stack_of(self, matrix: str) -> tuple[str, int] | None:
        """The 3-D parameter and the index of an expert called `<parameter>.<index>`; None for a plain module."""
        stack, _, index = matrix.rpartition(".")
        owner, _, parameter = stack.rpartition(".")
        found = self.find(owner) if index.isdecimal() and len(index) < 7 else None
        tensor = found[1]._parameters.get(parameter) if found else None
        return (stack, int(index)) if tensor is not None and tensor.ndim == 3 else None

    def stack(self, stack: str, formats: dict[int, Format]) -> None:
        owner, _, parameter = stack.rpartition(".")
        found = self.find(owner)
        assert found is not None  # stack_of has been there
        module = found[1]
        shape = tuple(module.get_parameter(parameter).shape)
        if sorted(formats) != list(range(shape[0])):
            raise UserError(f"config.json packs {len(formats)} experts of {stack!r}; the model has {shape[0]}")
        transposed = stack in self.record.transposed
        rows, cols = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        experts = []
        for index in range(shape[0]):
            expert = PackedExpert()
            shared = self.shared(f"{stack}.{index}")
            expert.hold(formats[index], rows, cols, mode="call", dtype=self.dtype, shared=shared)
            experts.append(expert)
        del module._parameters[parameter]
        packed = ExpertStack(experts, transposed=transposed, mode=self.mode, dtype=self.dtype)
        module.add_module(parameter, packed)

    def tie(self, head: str, source: str) -> None:
        found, target = self.require(source), self.require(head)
        if found is None or target is None:
            return
        if not isinstance(found[1], CompressedEmbedding) or not isinstance(target[1], nn.Linear):
            raise UserError(f"config.json ties {head!r} to {source!r}, which is no head and packed embedding")
        tie_head(target[1], found[1])


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _as_linear(module: Conv1D) -> nn.Linear:
    """A linear module with the Conv1D's bias; its weight is about to be replaced."""
    result = nn.Linear(module.nx, module.nf, bias=False, device="meta")
    result.bias = module.bias
    result.train(module.training)
    return result


def install(model: PreTrainedModel, record: QuantizationRecord, dtype: torch.dtype) -> None:
    """Replace every module that `record` names by its packed kind with empty fields, on the current default device.

    Raises UserError for a name the model lacks or a module that cannot be packed. Run it under torch.device("meta")
    or on a meta model to allocate nothing.
    """
    work = _Replacement(model, record, dtype)
    stacks: dict[str, dict[int, Format]] = defaultdict(dict)
    for matrix, fmt in record.matrices():
        expert = work.stack_of(matrix)
        if expert is None:
            work.plain(matrix, fmt)
        else:
            stacks[expert[0]][expert[1]] = fmt
    for stack, formats in stacks.items():
        work.stack(stack, formats)
    for head, source in record.tied.items():
        work.tie(head, source)
    link_input_groups(work.linears)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Every packed matrix of `model` by the name its fields start with."""
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            yield name, module


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every stored field and shared codebook of `model`: tensor name -> uint8 buffer."""
    tensors = {f"{name}.{field}": raw for name, packed in packed_modules(model) for field, raw in packed.fields.items()}
    for name, module in model.named_modules():
        if isinstance(module, SharedCodebooks):
            tensors |= {f"{name}.{key}": raw for key, raw in module.named_buffers()}
    return tensors


def set_decode_mode(model: nn.Module, mode: DecodeMode) -> None:
    """Switch every packed module to "load" (keep decoded weights) or "call" (keep none)."""
    for module in model.modules():
        if isinstance(module, Decoding) and not isinstance(module, PackedExpert):
            module.mode = mode
            module.forget()


def prepare(model: nn.Module) -> None:
    """Build kernels and decode what is to be kept now, not at the first use."""
    for module in model.modules():
        if isinstance(module, Decoding) and not isinstance(module, PackedExpert):
            module.prepare()
