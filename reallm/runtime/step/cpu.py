"""The compiled decode step of a loaded model on the CPU, with the key-value cache of one text.

    step = compile_step(model)          # raises StepUnsupportedError with the reason
    step.reserve(300)
    logits = step.run(prompt)           # logits of the next token, after the whole prompt
    logits = step.run(token)            # then token by token

The source is generated from the model's dataflow graph (`codegen.decode_step`) and built once (`codegen.cpu.compiler`).
Packed matrices are read as they are stored, by the kernels of `runtime.cpu`, and uncompressed ones from torch's memory.
Activations and sums are float32 whatever the model's dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reallm.codegen.cpu.compiler import generated_library
from reallm.codegen.decode_step.operations import Weight
from reallm.codegen.decode_step.program import CacheDtype, StepProgram
from reallm.kernels.formats.codecs import DENSE_NAMES
from reallm.kernels.formats.formats import Format
from reallm.runtime.cpu import NativeMatrix, native_matrix
from reallm.runtime.modules import TiedHead
from reallm.runtime.operand import Operand
from reallm.runtime.packed import Packed
from reallm.system.torch_dtypes import FLOAT_DTYPES, FLOAT_NAMES

from .rotary import StepUnsupportedError, rotary_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITION_UNIT = 64
"""The number of positions of a cache is a multiple of this; the generated source needs multiples of 16."""
PROMPT_TOKENS = 512
"""Tokens of a prompt that are processed at once; scratch memory is proportional to it."""
NO_NATIVE = "native code cannot be built here"


class CacheOverflowError(ValueError):
    """A text needs more positions than the cache has."""


class _Run(ctypes.Structure):
    """`Run` of kernels/native/step/step.hpp."""

    _fields_ = (
        ("operands", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("orders", ctypes.c_void_p),
        ("angles", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("position", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


class Step:
    """The decode step of one model and the key-value cache of one text. Use it in one thread at a time."""

    def __init__(self, model: nn.Module, program: StepProgram, native: ctypes.CDLL) -> None:
        self.model, self.program, self.native = model, program, native
        self.vocabulary = program.weights[-1].rows
        self.position = self.capacity = 0
        self.threads = 1
        self._biases: dict[str, Tensor] = {}
        self._bind()
        self.refresh()
        self._identity = list(identities(model))

    def _bind(self) -> None:
        """Collect the operands of the model's matrices."""
        self._kept_alive: list[object] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        count = len(self.program.weights)
        operands, self._orders_at = (Operand * count)(), (ctypes.c_void_p * count)()
        for index, weight in enumerate(self.program.weights):
            operands[index] = self._operand(weight)
            if weight.ordered:
                self._orders_at[index] = self._reorder(weight, operands[index])
        self._operands = operands
        self._prepared = max(operand.prepared for operand in operands)
        self._scratch = torch.empty(0)

    def refresh(self) -> None:
        """Update the step's copies of weights, such as those of norms, which may have been trained meanwhile."""
        for copy, original in self._copies:
            copy.copy_(original)
        modules: list[Any] = [self.model.get_submodule(name) for name in self.program.vectors]
        self._norms = [module.weight.detach().to(torch.float32, copy=True).contiguous() for module in modules]
        self._norms_at = _pointers(self._norms)
        for operand, weight in zip(self._operands, self.program.weights, strict=True):
            if weight.bias:
                module: Any = self.model.get_submodule(weight.name)
                self._biases[weight.name] = module.bias.detach().to(torch.float32, copy=True).contiguous()
                operand.bias = self._biases[weight.name].data_ptr()

    def _operand(self, weight: Weight) -> Operand:
        """The operand of a matrix as it is stored, or of its decoded weight if native kernels cannot read it."""
        module: Any = self.model.get_submodule(weight.name)
        holder = module.source if isinstance(module, TiedHead) else module
        native = holder.native if isinstance(holder, Packed) else None
        if native is None or (isinstance(module, nn.Embedding) and not native.looks_up):
            native = self._dense(holder.dense() if isinstance(holder, Packed) else holder.weight.detach())
        self._kept_alive.append(native)
        return Operand.from_buffer_copy(native.operand)

    def _reorder(self, weight: Weight, operand: Operand) -> int:
        """Make `operand` read its input in the order in which its columns are stored.

        Returns the address of the position of each column in that order, int32 [cols]. The kernel that computes the
        input writes its values to these positions.
        """
        order = np.ctypeslib.as_array((ctypes.c_int32 * weight.cols).from_address(operand.permutation))
        positions = torch.from_numpy(np.argsort(order).astype(np.int32))
        if operand.channel_scales:
            scales = np.ctypeslib.as_array((ctypes.c_float * weight.cols).from_address(operand.channel_scales))
            self._kept_alive.append(reordered := torch.from_numpy(scales[order]))
            operand.channel_scales = reordered.data_ptr()
        operand.permutation, operand.input_key = None, operand.input_key ^ 2  # such an input is prepared differently
        self._kept_alive.append(positions)
        return positions.data_ptr()

    def _dense(self, weight: Tensor) -> NativeMatrix:
        """A native matrix that reads an uncompressed `weight`, or a padded copy of it that `refresh` updates."""
        fmt, (rows, cols) = Format.parse(DENSE_NAMES[FLOAT_NAMES[weight.dtype]]), weight.shape
        raw = weight.contiguous().view(torch.uint8).reshape(-1)
        if missing := fmt.nbytes(rows, cols) - raw.numel():
            padded = torch.cat([raw, raw.new_zeros(missing)])
            self._copies.append((padded[: raw.numel()], raw))
            raw = padded
        native = native_matrix(fmt, {"values": raw}, rows, cols)
        if native is None:
            raise StepUnsupportedError(NO_NATIVE)
        return native

    def outdated(self) -> bool:
        """Whether a module or tensor was replaced or moved, or a hook was added, since the step was compiled."""
        return self._identity != list(identities(self.model))

    def reserve(self, positions: int) -> None:
        """Start a new text of at most `positions` tokens, on as many threads as torch uses now."""
        self.position, self.threads = 0, torch.get_num_threads()
        capacity = -(-positions // POSITION_UNIT) * POSITION_UNIT
        if capacity <= self.capacity:
            return
        stride = -(-self.program.head_dim // 16) * 16
        dtype = FLOAT_DTYPES[self.program.cache]
        shape = (self.program.layers, self.program.kv_heads, capacity * stride)
        self._keys, self._values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self._angles = [each for name in self.program.tables for each in rotary_table(self.model, name, capacity)]
        self._angles_at = _pointers(self._angles)
        self.capacity = capacity

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """Append int64 `tokens` [n] to the text and return the logits of the next token, float32 [vocabulary].

        Raises CacheOverflowError if the cache has too few positions left, and ValueError for no tokens or a token that
        is not in the vocabulary.
        """
        tokens = tokens.to(torch.int64).contiguous()
        count = tokens.numel()
        if count == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= self.program.weights[0].rows:
            raise ValueError(f"expected at least one token, all tokens below {self.program.weights[0].rows}")
        if self.position + count > self.capacity:
            raise CacheOverflowError(
                f"{self.position} + {count} tokens are more than the {self.capacity} positions of the cache; "
                "reserve more before the text starts"
            )
        logits = torch.empty(self.vocabulary)
        for start in range(0, count, PROMPT_TOKENS):
            self._run(tokens[start : start + PROMPT_TOKENS], logits)
        return logits

    def _run(self, tokens: Tensor, logits: Tensor) -> None:
        count = tokens.numel()
        needed = count * (self.program.scratch + self._prepared)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed)
        run = _Run(
            ctypes.addressof(self._operands),
            ctypes.addressof(self._norms_at),
            ctypes.addressof(self._orders_at),
            ctypes.addressof(self._angles_at),
            self._keys.data_ptr(),
            self._values.data_ptr(),
            self._scratch.data_ptr(),
            self.capacity,
            self.position,
            count,
            self.threads,
        )
        self.native.reallm_step(
            ctypes.byref(run), ctypes.c_void_p(tokens.data_ptr()), ctypes.c_void_p(logits.data_ptr())
        )
        self.position += count


def compile_step(model: PreTrainedModel, cache: CacheDtype = "f32") -> Step:
    """Compile the step of `model` and bind its weights. Raises StepUnsupportedError, with the reason."""
    from reallm.codegen.decode_step.emit_cpp import emit_step  # a program that is kept needs neither graph nor passes
    from reallm.codegen.decode_step.passes import CPU_PASSES, run_step_passes

    from .model_reader import read_step

    return bind_step(model, emit_step(run_step_passes(read_step(model), CPU_PASSES), cache))


def bind_step(model: nn.Module, program: StepProgram) -> Step:
    """The step of `model` that runs `program`. Raises StepUnsupportedError if it cannot be built here."""
    native = generated_library("step", program.source)
    if native is None:
        raise StepUnsupportedError(NO_NATIVE)
    native.reallm_step_abi.restype = ctypes.c_int64
    native.reallm_step.restype = None
    if native.reallm_step_abi() != ctypes.sizeof(_Run) * 65536 + ctypes.sizeof(Operand):
        raise StepUnsupportedError("the C++ and Python layouts of its arguments differ")
    return Step(model, program, native)


def _pointers(tensors: list[Tensor]) -> Any:
    """An array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def identities(model: nn.Module) -> Iterator[object]:
    """Identifiers of everything in the model that must not change while a compiled step is used."""
    for name, module in model.named_modules():
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        yield name, type(module), bool(hooked), module.training, "prepare_inputs_for_generation" in vars(module)
        if isinstance(module, Packed):
            yield id(module.native), module.decoded.dtype  # a new one is built when a field is replaced
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.endswith(".decoded"):
            yield name, tensor.data_ptr(), tensor.dtype, tensor.shape
