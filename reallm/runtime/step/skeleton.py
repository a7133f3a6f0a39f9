"""A torch model with the modules that a decode step reads, and no others, made from the files of an artifact.

transformers builds the whole model, which takes longer than the rest of a short text together. A step needs only its
matrices, norms and rotary tables, by the names that `StepProgram` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reallm.artifacts.directory import read_record_of
from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.artifacts.stored_values import read_tensors
from reallm.codegen.decode_step.operations import Weight
from reallm.codegen.decode_step.program import StepProgram
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.dtypes import SAFETENSORS_DTYPES
from reallm.kernels.storage.safetensors_reader import StoredTensor
from reallm.planner.tables.tensor_layout import SHARED_PREFIX
from reallm.runtime.convert import pack_embedding, pack_linear, tie_head
from reallm.runtime.packed import Packed, SharedCodebooks
from reallm.system.torch_dtypes import TORCH_DTYPES

Angles = tuple[tuple[float, ...], float]
"""The frequencies of a rotary table, float32 [head_dim / 2], and the factor of its cosines and sines."""


class Rotary(nn.Module):
    """Rotary tables by name: "rope", or "rope.<kind of layer>"."""

    def __init__(self, angles: Mapping[str, Angles]) -> None:
        super().__init__()
        self.angles = {name: (torch.tensor(frequencies), factor) for name, (frequencies, factor) in angles.items()}

    def forward(self, dtype: Tensor, index: Tensor, kind: str = "") -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions `index` [1, n], each float32 [1, n, head_dim]."""
        frequencies, factor = self.angles[f"rope.{kind}" if kind else "rope"]
        half = index[..., None].to(torch.float32) * frequencies
        whole = torch.cat((half, half), dim=-1)
        return whole.cos() * factor, whole.sin() * factor


class Skeleton(nn.Module):
    """The modules of a decode step under the names that they have in transformers' model."""

    device = torch.device("cpu")

    def put(self, path: str, module: nn.Module) -> None:
        """Make `module` the submodule `path`, with empty modules above it where there are none."""
        parent: nn.Module = self
        *above, last = path.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, module)


def read_skeleton(folder: Path, program: StepProgram, angles: Mapping[str, Angles], dtype: torch.dtype) -> Skeleton:
    """The modules that `program` reads, from the artifact in `folder`; decoded weights are computed in `dtype`.

    The files are mapped, not copied. Raises UserError for damaged files, and KeyError for a tensor that is not there.
    """
    return _Builder(folder, dtype).build(program, angles)


class _Builder:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.record: QuantizationRecord = read_record_of(folder)
        self.stored: Mapping[str, StoredTensor] = read_tensors(folder)
        self.dtype = dtype
        self.formats = dict(self.record.matrices())
        self.keys = {matrix: key for key, matrices in self.record.shared.items() for matrix in matrices}
        self.files = {
            path: torch.from_numpy(np.memmap(path, np.uint8, "c")) for path in {t.path for t in self.stored.values()}
        }
        self.codebooks = self._shared_codebooks()

    def build(self, program: StepProgram, angles: Mapping[str, Angles]) -> Skeleton:
        model = Skeleton()
        for index, weight in enumerate(program.weights):
            if weight.name not in self.record.tied:
                model.put(weight.name, self._matrix(weight, embeds=index == 0))
        for head, source in self.record.tied.items():
            embedding: Any = model.get_submodule(source)
            linear = _empty_linear(embedding.rows, embedding.cols)
            model.put(head, tie_head(linear, embedding))
            self._add_bias(model.get_submodule(head), head)
        for name in program.vectors:
            norm = nn.Module()
            norm.weight = nn.Parameter(self._tensor(f"{name}.weight"), requires_grad=False)
            model.put(name, norm)
        model.put("model.rotary_emb", Rotary(angles))
        return model.eval()

    def _matrix(self, weight: Weight, embeds: bool) -> nn.Module:
        """The module of one matrix; with `embeds`, an embedding."""
        name, (rows, cols) = weight.name, (weight.rows, weight.cols)
        module = _empty_embedding(rows, cols) if embeds else _empty_linear(rows, cols)
        if name in self.formats:
            key, fmt = self.keys.get(name), self.formats[name]
            shared = None if key is None else (self.codebooks, key)
            packed: Packed
            with torch.device("meta"):
                if isinstance(module, nn.Embedding):
                    packed = pack_embedding(module, fmt, self.record.decode, self.dtype, shared)
                else:
                    packed = pack_linear(module, fmt, self.record.decode, self.dtype, shared)
            packed.decoded = torch.empty(0, dtype=self.dtype)
            packed.write((field.name, self._tensor(f"{name}.{field.name}")) for field in fmt.fields(rows, cols))
            module = packed
        else:
            module.weight = nn.Parameter(self._tensor(f"{name}.weight"), requires_grad=False)
        if weight.bias:
            self._add_bias(module, name)
        return module

    def _add_bias(self, module: nn.Module, name: str) -> None:
        if f"{name}.bias" in self.stored or f"{name}.bias" in self.record.aliases:
            module.bias = nn.Parameter(self._tensor(f"{name}.bias"), requires_grad=False)

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor, or the one that `name` is an alias of."""
        tensor = self.stored[self.record.aliases.get(name, name)]
        raw = self.files[tensor.path][tensor.start : tensor.stop]
        if tensor.dtype == "U8":
            return raw
        dtype = TORCH_DTYPES[SAFETENSORS_DTYPES[tensor.dtype].name]
        if tensor.start % dtype.itemsize:
            raw = raw.clone()  # torch needs aligned memory
        return raw.view(dtype).reshape(tensor.shape)

    def _shared_codebooks(self) -> SharedCodebooks:
        formats: Mapping[str, Format] = self.record.shared_formats()
        codebooks = SharedCodebooks({key: fmt.shared_field for key, fmt in formats.items() if fmt.shared_field})
        for name, holder in codebooks.named_children():
            holder.codebooks = self._tensor(f"{SHARED_PREFIX}{name}.codebooks")
        return codebooks


def _empty_linear(rows: int, cols: int) -> nn.Linear:
    """A linear module without its weight, which the caller sets.

    It is not made on "meta": initialising a weight there imports torch's compiler.
    """
    result = nn.Linear(1, 1, bias=False)
    result.in_features, result.out_features = cols, rows
    return result


def _empty_embedding(rows: int, cols: int) -> nn.Embedding:
    """An embedding without its weight, which the caller sets."""
    result = nn.Embedding(1, 1)
    result.num_embeddings, result.embedding_dim = rows, cols
    return result
