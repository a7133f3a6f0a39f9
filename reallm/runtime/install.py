"""Put packed modules into a model, for the matrices that a `QuantizationRecord` names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reallm.artifacts.quantization_config import DecodeMode, QuantizationRecord
from reallm.errors import UserError
from reallm.kernels.formats.formats import Format

from .convert import pack_embedding, pack_linear, tie_head
from .experts import ExpertStack, PackedExpert
from .input_groups import link_input_groups
from .modules import CompressedEmbedding, CompressedLinear
from .packed import Decoding, Packed, Shared, SharedCodebooks
from .parts import candidates


class _Installer:
    """Replaces modules of one model; the packed ones get the record's decode mode and compute in `dtype`."""

    def __init__(self, model: PreTrainedModel, record: QuantizationRecord, dtype: torch.dtype) -> None:
        self.model, self.record, self.dtype = model, record, dtype
        self.mode: DecodeMode = record.decode
        self.codebook_keys = {matrix: key for key, matrices in record.shared.items() for matrix in matrices}
        fields = {key: fmt.shared_field for key, fmt in record.shared_formats().items()}
        self.linears: dict[str, CompressedLinear] = {}
        self.codebooks = SharedCodebooks({key: field for key, field in fields.items() if field})
        self.parents: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self.parents[child].append((parent, name))
        if fields:
            model.add_module(SharedCodebooks.NAME, self.codebooks)

    def shared(self, matrix: str) -> Shared:
        key = self.codebook_keys.get(matrix)
        return None if key is None else (self.codebooks, key)

    def replace(self, module: nn.Module, replacement: nn.Module) -> None:
        """Put `replacement` wherever `module` is a child (a module may have several parents)."""
        for parent, name in self.parents.pop(module):
            setattr(parent, name, replacement)

    def find(self, name: str) -> tuple[str, nn.Module] | None:
        """(path, module) for `name`, with or without the base model's prefix; None if there is no such module."""
        for candidate in candidates(name, self.model):
            module = _submodule(self.model, candidate)
            if module is not None:
                return candidate, module
        return None

    def require(self, name: str) -> tuple[str, nn.Module]:
        """Like `find`, but raise UserError for a missing module."""
        located = self.find(name)
        if located is None:
            raise UserError(f"config.json names {name!r}, which {type(self.model).__name__} does not have")
        return located

    def pack(self, matrix: str, fmt: Format) -> None:
        """Replace the linear or embedding module `matrix` by a packed one in format `fmt`."""
        name, module = self.require(matrix)
        plain = _as_linear(module) if isinstance(module, Conv1D) else module
        shared = self.shared(matrix)
        if isinstance(plain, nn.Linear) and not isinstance(plain, Packed):
            packed = self.linears[name] = pack_linear(plain, fmt, self.mode, self.dtype, shared)
            if isinstance(module, Conv1D):
                packed.original = packed.original._replace(kind=Conv1D)
            self.replace(module, packed)
        elif isinstance(plain, nn.Embedding) and not isinstance(plain, Packed):
            self.replace(module, pack_embedding(plain, fmt, self.mode, self.dtype, shared))
        else:
            kind = type(module).__name__
            raise UserError(
                f"config.json packs {matrix!r}, a {kind}, which is neither a linear nor an embedding module"
            )

    def stack_of(self, matrix: str) -> tuple[str, int] | None:
        """(3-D parameter, index) of an expert's matrix, named `<parameter>.<index>`; None for other matrices."""
        stack, _, index = matrix.rpartition(".")
        owner, _, parameter = stack.rpartition(".")
        located = self.find(owner) if index.isdecimal() and len(index) < 7 else None
        tensor = located[1]._parameters.get(parameter) if located else None
        return (stack, int(index)) if tensor is not None and tensor.ndim == 3 else None

    def pack_stack(self, stack: str, formats: dict[int, Format]) -> None:
        """Replace the 3-D parameter `stack` by packed experts; `formats` maps the index of each to its format."""
        owner, _, parameter = stack.rpartition(".")
        located = self.find(owner)
        assert located is not None  # `stack_of` has found it
        module = located[1]
        shape = tuple(module.get_parameter(parameter).shape)
        if sorted(formats) != list(range(shape[0])):
            raise UserError(f"config.json packs {len(formats)} experts of {stack!r}; the model has {shape[0]}")
        transposed = stack in self.record.transposed
        rows, cols = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        experts = []
        for index in range(shape[0]):
            expert = PackedExpert()
            shared = self.shared(f"{stack}.{index}")
            expert.allocate_fields(formats[index], rows, cols, mode="call", dtype=self.dtype, shared=shared)
            experts.append(expert)
        del module._parameters[parameter]
        packed = ExpertStack(experts, transposed=transposed, mode=self.mode, dtype=self.dtype)
        module.add_module(parameter, packed)

    def tie(self, head: str, source: str) -> None:
        """Make the module `head` use the weight of the packed embedding `source`."""
        embedding, target = self.require(source)[1], self.require(head)[1]
        if not isinstance(embedding, CompressedEmbedding) or not isinstance(target, nn.Linear):
            raise UserError(f"config.json ties {head!r} to {source!r}; expected a head and a packed embedding")
        self.replace(target, tie_head(target, embedding))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _as_linear(module: Conv1D) -> nn.Linear:
    """A linear module with the bias of `module`; its weight is on "meta", because the caller replaces it."""
    result = nn.Linear(module.nx, module.nf, bias=False, device="meta")
    result.bias = module.bias
    result.train(module.training)
    return result


def install(model: PreTrainedModel, record: QuantizationRecord, dtype: torch.dtype) -> None:
    """Replace every module that `record` names by a packed one that computes in `dtype`.

    The fields are uninitialised and on the current default device: run this under torch.device("meta") or on a meta
    model to allocate nothing. Raises UserError for a name that the model lacks or a module that cannot be packed.
    """
    installer = _Installer(model, record, dtype)
    stacks: dict[str, dict[int, Format]] = defaultdict(dict)
    for matrix, fmt in record.matrices():
        expert = installer.stack_of(matrix)
        if expert is None:
            installer.pack(matrix, fmt)
        else:
            stacks[expert[0]][expert[1]] = fmt
    for stack, formats in stacks.items():
        installer.pack_stack(stack, formats)
    for head, source in record.tied.items():
        installer.tie(head, source)
    link_input_groups(installer.linears)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    """(name, module) of every packed matrix of `model`; the tensors of its fields are called `<name>.<field>`."""
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
            module.drop_cache()


def prepare(model: nn.Module) -> None:
    """Prepare every packed module for its first use: build its native matrix, or decode the weight that it keeps."""
    for module in model.modules():
        if isinstance(module, Decoding) and not isinstance(module, PackedExpert):
            module.prepare()
