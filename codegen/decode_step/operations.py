"""The operations of a decode step: each is one node of the graph, with the widths of its inputs and outputs.

A width is a number of floats per token; the token's id, an integer, has width 0. To add an operation, write a
frozen dataclass with its parameters as fields, its widths and its printed form, and teach the emitters about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix W[rows, cols] of the model, named by its module."""

    name: str
    rows: int
    cols: int
    stored: str
    """How the matrix is stored: a dtype (`bf16`) or the name of a format."""
    bias: bool = False
    transform: str = ""
    """How the input is transformed before it is multiplied.

    Matrices with the same input and the same transform share the transformed input.
    """
    permuted: bool = False
    """Whether the columns are stored in another order, which only the vector that the codes multiply must have too."""
    ordered: bool = False
    """Whether the input already comes in the order of the stored columns. Set by `passes.fold_permutations`."""

    def __str__(self) -> str:
        notes = f"{' + bias' if self.bias else ''}{', its input in order' if self.ordered else ''}"
        return f"{self.name} [{self.rows}, {self.cols}] {self.stored}{notes}"


@dataclass(frozen=True, slots=True)
class Operation(ABC):
    """Base class of all operations."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[int, ...]:
        """Widths of the values that the operation gives."""

    @property
    def reads(self) -> tuple[int, ...]:
        """Widths of the values that the operation reads; by default one value, as wide as the output."""
        return self.outputs


@dataclass(frozen=True, slots=True)
class Token(Operation):
    """The id of the input token."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return (0,)

    @property
    def reads(self) -> tuple[int, ...]:
        return ()

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True, slots=True)
class Embed(Operation):
    """Row `token` of the embedding, times `scale`."""

    weight: Weight
    scale: float

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.weight.cols,)

    @property
    def reads(self) -> tuple[int, ...]:
        return (0,)

    def __str__(self) -> str:
        return f"embed {self.weight}" + (f" * {self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True, slots=True)
class Norm(Operation):
    """x / sqrt(mean(x^2) + eps) * weight over each of `groups` parts of `width` values; `plus_one`: * (1 + weight)."""

    weight: str
    width: int
    eps: float
    plus_one: bool
    groups: int = 1

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width * self.groups,)

    def __str__(self) -> str:
        plus = "1 + " if self.plus_one else ""
        parts = f" in {self.groups} parts" if self.groups > 1 else ""
        return f"norm * ({plus}{self.weight}) eps {self.eps:g}{parts}"


@dataclass(frozen=True, slots=True)
class Linear(Operation):
    """y = W x for each matrix W of `weights`; gives one value per matrix."""

    weights: tuple[Weight, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(weight.rows for weight in self.weights)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.weights[0].cols,)

    def __str__(self) -> str:
        return "linear " + "; ".join(map(str, self.weights))


@dataclass(frozen=True, slots=True)
class Rotary(Operation):
    """Rotates the pairs of entries (i, i + head_dim / 2) of every head by the angles in `table` for the position."""

    heads: int
    head_dim: int
    table: str

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.heads * self.head_dim,)

    def __str__(self) -> str:
        return f"rotary {self.heads} x {self.head_dim} by {self.table}"


@dataclass(frozen=True, slots=True)
class Attention(Operation):
    """Appends key and value to the cache of `layer`, then gives softmax(cap(scale q K^T)) V over the visible positions.

    A query at position p sees the positions from max(0, p - window + 1) to p; cap(s) = softcap tanh(s / softcap).
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.heads * self.head_dim,)

    @property
    def reads(self) -> tuple[int, ...]:
        cached = self.kv_heads * self.head_dim
        return (self.heads * self.head_dim, cached, cached)

    def __str__(self) -> str:
        text = f"attention {self.heads} heads of {self.kv_heads} x {self.head_dim} scale {self.scale:.6g}"
        text += f" window {self.window}" if self.window else ""
        return text + (f" softcap {self.softcap:g}" if self.softcap else "") + f" cache {self.layer}"


@dataclass(frozen=True, slots=True)
class Gate(Operation):
    """act(first) * second."""

    activation: Activation
    width: int
    order: str = ""
    """Name of a matrix: values are written in the order of its stored columns. If empty, in their natural order."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.width, self.width)

    def __str__(self) -> str:
        return f"{self.activation} gate{_in_order(self.order)}"


@dataclass(frozen=True, slots=True)
class Add(Operation):
    """The sum of two values."""

    width: int

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.width, self.width)

    def __str__(self) -> str:
        return "add"


@dataclass(frozen=True, slots=True)
class Softcap(Operation):
    """cap tanh(x / cap)."""

    width: int
    cap: float

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    def __str__(self) -> str:
        return f"softcap {self.cap:g}"


@dataclass(frozen=True, slots=True)
class Residual(Operation):
    """Two values: the sum h + post(y), and the norm of the sum. Made by `passes.fuse_residuals`."""

    norm: Norm
    post: Norm | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.norm.width, self.norm.width)

    def __str__(self) -> str:
        post = f"({self.post}) " if self.post else ""
        return f"residual {post}then {self.norm}"


@dataclass(frozen=True, slots=True)
class Attend(Operation):
    """Attention, including the norms and rotations of query and key. Made by `passes.fuse_attention`."""

    attention: Attention
    table: str
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    order: str = ""
    """As in `Gate`."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.attention.outputs

    @property
    def reads(self) -> tuple[int, ...]:
        return self.attention.reads

    def __str__(self) -> str:
        norms = [f"{name} {norm}" for name, norm in (("q", self.query_norm), ("k", self.key_norm)) if norm]
        return "; ".join([f"{self.attention} rotary by {self.table}", *norms]) + _in_order(self.order)


def _in_order(matrix: str) -> str:
    return f" in the order of {matrix}" if matrix else ""
