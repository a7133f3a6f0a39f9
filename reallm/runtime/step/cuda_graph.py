"""The decode step of a model on a GPU: its dataflow graph as a few launches, recorded once, replayed for each token.

    step = record_step(model)           # raises StepUnsupportedError with the reason
    step.reserve(300)
    logits = step.run(prompt)           # the whole prompt, launch by launch
    logits = step.run(token)            # then token by token, by one CUDA graph

Products are computed by the model's own modules, packed or not; norms, gates and attention by the kernels of
`codegen.decode_step.triton_kernels`. The graph is that of `model_reader`, after the passes of
`codegen.decode_step.passes`. The sum of the blocks' outputs is kept in float32; everything else, keys and values
included, has the dtype the model computes in.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from reallm.codegen.decode_step.graph import StepGraph, Value
from reallm.codegen.decode_step.operations import Add, Attend, Embed, Gate, Linear, Norm, Residual, Softcap, Token
from reallm.codegen.decode_step.passes import run_step_passes
from reallm.codegen.ir.lower import has_kernel
from reallm.codegen.launch.launch import on_device
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.packed import Packed
from reallm.runtime.triton_linear import PROBES, kernels_work

from .cpu import CacheOverflowError, identities
from .model_reader import read_step
from .rotary import StepUnsupportedError, rotary_table

POSITION_UNIT = 64
"""The number of positions of a cache is a multiple of this."""
PROMPT_TOKENS = 2048
"""Tokens of a prompt that are processed at once."""
SHARE = 256
"""The cache of a head is divided into shares of about this many positions, one per instance of the kernel `attend`."""
MAX_SHARES = 16
"""Maximum number of shares per head; with a longer cache the shares are larger."""
ATTEND_BLOCK = 32
"""Number of positions whose keys an instance of `attend` holds in registers at the same time."""
GATE_BLOCK = 1024


class RecordedStep:
    """The decode step of one model and the key-value cache of one text. Use it in one thread at a time."""

    def __init__(self, model: PreTrainedModel, graph: StepGraph) -> None:
        from reallm.codegen.decode_step import triton_kernels as step_kernels

        self.model, self.graph, self.kernels = model, graph, step_kernels
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.get_input_embeddings()(
            torch.zeros(1, dtype=torch.int64, device=self.device)
        ).dtype
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.position = self.capacity = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._recorded: Any = None
        self._read: list[tuple[Packed, object, Tensor]] = []
        self._identity = list(identities(model))

    def refresh(self) -> None:
        """Do nothing: the step copies nothing from the model, so it sees values that are changed in place."""

    def outdated(self) -> bool:
        """Whether the recording is no longer valid.

        That is so if a module or tensor of the model was replaced or moved, or a hook was added, since the step was
        built, or if a packed module has replaced a decoded or derived tensor that the recording reads.
        """
        unchanged = all(m.derived is derived and m.decoded is decoded for m, derived, decoded in self._read)
        return not unchanged or self._identity != list(identities(self.model))

    @torch.inference_mode(False)
    def reserve(self, positions: int) -> None:
        """Start a new text of at most `positions` tokens. Raises StepUnsupportedError if the cache does not fit."""
        self.position = 0
        capacity = -(-positions // POSITION_UNIT) * POSITION_UNIT
        if capacity <= self.capacity:
            return
        self.capacity, self._recorded, self._keys, self._values = 0, None, {}, {}
        try:
            self._allocate(capacity)
        except torch.OutOfMemoryError:
            self._keys, self._values = {}, {}
            raise StepUnsupportedError(f"keys and values of {capacity} positions do not fit into memory") from None
        self.capacity = capacity

    def _allocate(self, capacity: int) -> None:
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        for _, op in self.graph:
            if isinstance(op, Attend):
                inner = op.attention
                shape = (inner.kv_heads, capacity, inner.head_dim)
                self._keys[inner.layer] = torch.zeros(shape, dtype=self.dtype, device=self.device)
                self._values[inner.layer] = torch.zeros(shape, dtype=self.dtype, device=self.device)
                self._tables[op.table] = self._tables.get(op.table) or rotary_table(self.model, op.table, capacity)
        self._token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._now = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """Append int64 `tokens` [n] to the text and return the logits of the next token, float32 [vocabulary].

        Raises CacheOverflowError if the cache has too few positions left, and ValueError for no tokens or, in a prompt,
        a token that is not in the vocabulary.
        """
        tokens = tokens.to(self.device, torch.int64, copy=True)
        count, first = tokens.numel(), not self.position
        if count == 0 or ((count > 1 or first) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary):
            raise ValueError(f"expected at least one token, all tokens below {self.vocabulary}")
        if self.position + count > self.capacity:
            raise CacheOverflowError(
                f"{self.position} + {count} tokens are more than the {self.capacity} positions of the cache; "
                "reserve more before the text starts"
            )
        with on_device(self._token):
            return self._next(tokens).clone() if count == 1 and not first else self._prompt_of(tokens)

    def _prompt_of(self, tokens: Tensor) -> Tensor:
        """The logits after `tokens` [n], float32 [vocabulary], computed launch by launch."""
        for start in range(0, tokens.numel(), PROMPT_TOKENS):
            part = tokens[start : start + PROMPT_TOKENS]
            logits = self._walk(part)
            self.position += part.numel()
        self._now.fill_(self.position)
        return logits

    def _next(self, token: Tensor) -> Tensor:
        """The logits after one token, float32 [vocabulary], by replaying the recording if there is one."""
        self._token.copy_(token)
        if self._recorded is None and self.device.type == "cuda":
            self._record()
        if self._recorded is None:
            self._logits = self._walk(self._token, self._now)
            self._now += 1
        else:
            self._recorded.replay()
        self.position += 1
        return self._logits

    def _record(self) -> None:
        """Record the launches for one token and the increment of the position.

        The launches also run once before the recording, which compiles kernels and allocates the tensors that modules
        keep. The first replay runs them again for the same token, and writes the same keys and values.
        """
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._walk(self._token, self._now)
        torch.cuda.current_stream().wait_stream(side)
        packed = [module for module in self.model.modules() if isinstance(module, Packed)]
        self._read = [(module, module.derived, module.decoded) for module in packed]  # the recording reads them
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
            self._logits = self._walk(self._token, self._now)
            self._now += 1
        self._recorded = recorded

    def _walk(self, tokens: Tensor, now: Tensor | None = None) -> Tensor:
        """Run the graph for `tokens` [n] in order; return the logits of the last.

        `now` holds the position on the device and is given for a single token only.
        """
        values: dict[Value, Tensor] = {}
        for name, op in self.graph:
            inputs = [values[value] for value in self.graph.inputs(name)]
            outputs: tuple[Tensor, ...]
            match op:
                case Token():
                    outputs = (tokens,)
                case Embed(weight):
                    outputs = (self._module(weight.name)(inputs[0]),)
                case Norm():
                    outputs = self._norm(op, None, inputs[0], None)[1:]
                case Residual(norm, post):
                    outputs = self._norm(norm, post, *inputs)
                case Add():
                    outputs = (inputs[0].float() + inputs[1],)
                case Linear(weights):
                    x = inputs[0][-1:] if Value(name) == self.graph.logits or self._before_cap(name) else inputs[0]
                    outputs = tuple(self._module(weight.name)(x) for weight in weights)
                case Gate(activation):
                    outputs = (self._gate(activation, *inputs),)
                case Attend():
                    outputs = (self._prompt(op, *inputs) if now is None else self._attend(op, now, *inputs),)
                case Softcap(_, cap):
                    outputs = (cap * torch.tanh(inputs[0].float() / cap),)
                case _:
                    raise StepUnsupportedError(f"there is no kernel for {name} = {op}")
            values |= {Value(name, port): tensor for port, tensor in enumerate(outputs)}
        return values[self.graph.logits].float()[-1]

    def _before_cap(self, name: str) -> bool:
        return any(isinstance(self.graph.op(node), Softcap) for node, _ in self.graph.readers(Value(name)))

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _norm(self, norm: Norm, post: Norm | None, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sum, norm of the sum), where the sum is h + y, or h + post(y), in float32; without y it is h."""
        weight = self._module(norm.weight).weight
        after = weight if post is None else self._module(post.weight).weight
        normed = torch.empty(h.shape, dtype=self.dtype, device=h.device)
        total = h if y is None else torch.empty(h.shape, dtype=torch.float32, device=h.device)
        block = 1 << (norm.width - 1).bit_length()
        self.kernels.norm_rows[(h.shape[0],)](
            *(h, h if y is None else y, after, weight, total, normed, norm.eps, post.eps if post else 0.0),
            WIDTH=norm.width, BLOCK=block, PLUS_ONE=norm.plus_one, ADDS=y is not None,
            POST=0 if post is None else 1 + post.plus_one, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
        return total, normed

    def _gate(self, activation: str, a: Tensor, b: Tensor) -> Tensor:
        y = torch.empty_like(a)
        self.kernels.gate[(-(-a.numel() // GATE_BLOCK),)](
            a, b, y, a.numel(), BLOCK=GATE_BLOCK, ACTIVATION=activation, num_warps=4
        )
        return y

    def _attend(self, op: Attend, now: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one token at the position `now`."""
        inner = op.attention
        shares = min(MAX_SHARES, 1 << (-(-self.capacity // SHARE) - 1).bit_length())
        y = torch.empty_like(q)
        part = torch.empty(inner.heads, shares, inner.head_dim, device=q.device)
        ends = torch.empty(inner.heads, shares, 2, device=q.device)
        norms = [
            (norm, self._module(norm.weight).weight) if norm else (None, q) for norm in (op.query_norm, op.key_norm)
        ]
        (q_norm, q_weight), (k_norm, k_weight) = norms
        half = inner.head_dim // 2
        self.kernels.attend[(inner.heads, shares)](
            *(q, k, v, q_weight, k_weight, *self._tables[op.table], self._keys[inner.layer], self._values[inner.layer]),
            *(now, part, ends, y, q_norm.eps if q_norm else 0.0, k_norm.eps if k_norm else 0.0, self.capacity),
            GROUP=inner.heads // inner.kv_heads, HALF=half, LANES=1 << (half - 1).bit_length(), BLOCK=ATTEND_BLOCK,
            SPLITS=shares, SCALE=inner.scale, WINDOW=inner.window or 0, CAP=inner.softcap or 0.0,
            Q_NORM=1 + q_norm.plus_one if q_norm else 0, K_NORM=1 + k_norm.plus_one if k_norm else 0, num_warps=4,
        )  # fmt: skip
        if shares > 1:
            block = 1 << (inner.head_dim - 1).bit_length()
            self.kernels.join_shares[(inner.heads,)](
                part, ends, y, WIDTH=inner.head_dim, BLOCK=block, SPLITS=shares, num_warps=1
            )
        return y

    def _prompt(self, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of n tokens from `position` on, by torch."""
        inner, count = op.attention, q.shape[0]
        span = slice(self.position, self.position + count)
        cosines, sines = (table[span, None] for table in self._tables[op.table])
        rotated = []
        for x, norm in ((q, op.query_norm), (k, op.key_norm)):
            heads = x.reshape(count, -1, inner.head_dim)
            if norm:
                flat = heads.reshape(-1, inner.head_dim)
                heads = self._norm(norm, None, flat, None)[1].view_as(heads)
            first, second = heads.float().chunk(2, -1)
            rotated.append(torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1))
        keys, values = self._keys[inner.layer], self._values[inner.layer]
        keys[:, span] = rotated[1].transpose(0, 1).to(self.dtype)
        values[:, span] = v.view(count, -1, inner.head_dim).transpose(0, 1)
        length = self.position + count
        query = rotated[0].transpose(0, 1).to(self.dtype)
        index = torch.arange(length, device=q.device)
        distance = index[self.position :, None] - index
        mask = (distance >= 0) & (distance < (inner.window or length))
        if inner.softcap:
            groups = query.reshape(inner.kv_heads, -1, count, inner.head_dim).float()
            scores = groups @ keys[:, None, :length].float().transpose(-1, -2) * inner.scale
            scores = inner.softcap * torch.tanh(scores / inner.softcap)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            mixed = (weights @ values[:, None, :length].float()).reshape(inner.heads, count, inner.head_dim)
        else:
            mixed = scaled_dot_product_attention(
                *(query[None], keys[None, :, :length], values[None, :, :length]),
                attn_mask=mask, scale=inner.scale, enable_gqa=inner.heads != inner.kv_heads,
            )[0]  # fmt: skip
        return mixed.transpose(0, 1).reshape(count, -1).to(self.dtype)


def record_step(model: PreTrainedModel) -> RecordedStep:
    """The step of a model on a GPU, recorded when it first runs for a single token.

    Raises StepUnsupportedError, with the reason.
    """
    if importlib.util.find_spec("triton") is None:
        raise StepUnsupportedError("Triton is not installed")
    if model.device.type == "cuda" and not kernels_work(model.device, PROBES[0]):
        raise StepUnsupportedError("generated kernels cannot be used here")
    for name, module in model.named_modules():
        through_kernel = isinstance(module, CompressedLinear) and has_kernel(module.format)
        if isinstance(module, Packed) and module.mode == "call" and not through_kernel:
            raise StepUnsupportedError(f"{name} is decoded at every call, which cannot be recorded")
    return RecordedStep(model, run_step_passes(read_step(model)))
