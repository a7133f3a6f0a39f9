"""The decode step of a decoder-only model as a dataflow graph: one token in, its logits out, printable.

A node is one operation, an edge carries one value: `rows` floats a token (the token's number itself has none). A value
is named by its node, or by node and output where a node has several (`x.1`). Built from a model by
`reallm.runtime.step.model_reader`; `step_passes` rewrites it and `step` emits it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import networkx as nx

from reallm.codegen.ir.operations import CodegenError

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix W[rows, cols] of the model by its module, and how it is stored: a dtype (`bf16`) or a format's name."""

    name: str
    rows: int
    cols: int
    stored: str
    bias: bool = False
    transform: str = ""
    """What is done to the input before the codes see it; matrices with equal inputs and transforms share the result."""
    permuted: bool = False
    """Whether its columns are stored in another order, and only what its codes are multiplied by needs that order."""
    ordered: bool = False
    """Whether its input comes in the order of its stored columns. Made by `step_passes.fold_permutations`."""

    def __str__(self) -> str:
        notes = f"{' + bias' if self.bias else ''}{', its input in order' if self.ordered else ''}"
        return f"{self.name} [{self.rows}, {self.cols}] {self.stored}{notes}"


@dataclass(frozen=True, slots=True)
class Norm:
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
class Token:
    """The number of the token that is read."""

    outputs: ClassVar[tuple[int, ...]] = (0,)

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True, slots=True)
class Embed:
    """Row `token` of the embedding, times `scale`."""

    weight: Weight
    scale: float

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.weight.cols,)

    def __str__(self) -> str:
        return f"embed {self.weight}" + (f" * {self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x for each of `weights`: one value each."""

    weights: tuple[Weight, ...]

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(weight.rows for weight in self.weights)

    def __str__(self) -> str:
        return "linear " + "; ".join(map(str, self.weights))


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotate the pairs (i, i + head_dim / 2) of every head by the angles of the position in `table`."""

    heads: int
    head_dim: int
    table: str

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.heads * self.head_dim,)

    def __str__(self) -> str:
        return f"rotary {self.heads} x {self.head_dim} by {self.table}"


@dataclass(frozen=True, slots=True)
class Attention:
    """Append key and value to the cache of `layer`, then softmax(cap(q K^T scale)) V over what a query may see.

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

    def __str__(self) -> str:
        text = f"attention {self.heads} heads of {self.kv_heads} x {self.head_dim} scale {self.scale:.6g}"
        text += f" window {self.window}" if self.window else ""
        return text + (f" softcap {self.softcap:g}" if self.softcap else "") + f" cache {self.layer}"


@dataclass(frozen=True, slots=True)
class Gate:
    """act(first) * second."""

    activation: Activation
    width: int
    order: str = ""
    """The matrix in whose order of columns the values are written; their own if empty."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    def __str__(self) -> str:
        return f"{self.activation} gate{_in_order(self.order)}"


@dataclass(frozen=True, slots=True)
class Add:
    """The sum of two values."""

    width: int

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    def __str__(self) -> str:
        return "add"


@dataclass(frozen=True, slots=True)
class Softcap:
    """cap tanh(x / cap)."""

    width: int
    cap: float

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.width,)

    def __str__(self) -> str:
        return f"softcap {self.cap:g}"


@dataclass(frozen=True, slots=True)
class Residual:
    """h + post(y), and the norm of that: two values. Made by `step_passes.fuse_residuals`."""

    norm: Norm
    post: Norm | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.norm.width, self.norm.width)

    def __str__(self) -> str:
        post = f"({self.post}) " if self.post else ""
        return f"residual {post}then {self.norm}"


@dataclass(frozen=True, slots=True)
class Attend:
    """Attention with the norms and rotations of its query and key inside. Made by `step_passes.fuse_attention`."""

    attention: Attention
    table: str
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    order: str = ""
    """As of a Gate."""

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.attention.outputs

    def __str__(self) -> str:
        norms = [f"{name} {norm}" for name, norm in (("q", self.query_norm), ("k", self.key_norm)) if norm]
        return "; ".join([f"{self.attention} rotary by {self.table}", *norms]) + _in_order(self.order)


def _in_order(matrix: str) -> str:
    return f" in the order of {matrix}" if matrix else ""


Op = Token | Embed | Norm | Linear | Rotary | Attention | Gate | Add | Softcap | Residual | Attend
ARITY = {Token: 0, Embed: 1, Norm: 1, Linear: 1, Rotary: 1, Attention: 3, Gate: 2, Add: 2, Softcap: 1}
ARITY |= {Residual: 2, Attend: 3}


@dataclass(frozen=True, slots=True)
class Value:
    """An output of a node."""

    node: str
    port: int = 0


@dataclass
class StepGraph:
    """Nodes in the order of a topological sort that keeps the order they were added in; the last gives the logits.

    `network` is a networkx graph: node -> op, edge -> slot (which input of its target) and port (which output of its
    source).
    """

    model: str
    """The model's class."""
    network: nx.MultiDiGraph = field(default_factory=nx.MultiDiGraph)
    logits: Value = field(default_factory=lambda: Value(""))

    def add(self, name: str, op: Op, *inputs: Value) -> Value:
        """Add a node that reads `inputs`; its first output."""
        if name in self.network:
            raise CodegenError(f"the step of {self.model} has two nodes called {name!r}")
        self.network.add_node(name, op=op, order=self.network.number_of_nodes())
        for slot, value in enumerate(inputs):
            self.network.add_edge(value.node, name, key=slot, port=value.port)
        self.logits = Value(name)
        return self.logits

    def op(self, name: str) -> Op:
        """The operation of a node."""
        op: Op = self.network.nodes[name]["op"]
        return op

    def inputs(self, name: str) -> tuple[Value, ...]:
        """What a node reads, in order."""
        read = self.network.in_edges(name, keys=True, data=True)
        edges = sorted((slot, source, data["port"]) for source, _, slot, data in read)
        return tuple(Value(source, port) for _, source, port in edges)

    def readers(self, value: Value) -> list[tuple[str, int]]:
        """(node, slot) of whatever reads `value`."""
        edges = self.network.out_edges(value.node, data=True, keys=True)
        return [(target, slot) for _, target, slot, data in edges if data["port"] == value.port]

    def __iter__(self) -> Iterator[tuple[str, Op]]:
        order = nx.lexicographical_topological_sort(self.network, key=lambda n: self.network.nodes[n]["order"])
        return ((name, self.op(name)) for name in order)

    def replace(self, name: str, op: Op, inputs: tuple[Value, ...]) -> None:
        """Give a node another operation and other inputs."""
        self.network.remove_edges_from([(s, t, k) for s, t, k in self.network.in_edges(name, keys=True)])
        self.network.nodes[name]["op"] = op
        for slot, value in enumerate(inputs):
            self.network.add_edge(value.node, name, key=slot, port=value.port)

    def redirect(self, old: Value, new: Value) -> None:
        """Let every reader of `old` read `new`."""
        for node, slot in self.readers(old):
            self.network.remove_edge(old.node, node, key=slot)
            self.network.add_edge(new.node, node, key=slot, port=new.port)
        if self.logits == old:
            self.logits = new

    def width(self, value: Value) -> int:
        """Floats a token of a value."""
        return self.op(value.node).outputs[value.port]

    def label(self, value: Value) -> str:
        """`x`, or `x.1` where the node has several outputs."""
        return f"{value.node}.{value.port}" if len(self.op(value.node).outputs) > 1 else value.node

    def __str__(self) -> str:
        lines = [f"step of {self.model}"]
        for name, op in self:
            values = ", ".join(f"{self.label(Value(name, p))} [{w}]" for p, w in enumerate(op.outputs))
            reads = ", ".join(self.label(value) for value in self.inputs(name))
            lines.append(f"  {values} = {op}" + (f" ({reads})" if reads else ""))
        return "\n".join([*lines, f"  logits {self.label(self.logits)}"]) + "\n"


def verify_step(graph: StepGraph) -> None:
    """Raise CodegenError, naming the node, unless every value fits what reads it and each cache has one owner."""
    if not nx.is_directed_acyclic_graph(graph.network):
        raise CodegenError(f"the step of {graph.model} runs in a circle")
    caches: set[int] = set()
    for name, op in graph:
        inputs = graph.inputs(name)
        expected = _reads(op)
        found = tuple(graph.width(value) for value in inputs)
        if len(found) != ARITY[type(op)] or found != expected:
            raise CodegenError(f"step of {graph.model}: {name} = {op} reads values of {found}, not {expected}")
        attention = op.attention if isinstance(op, Attend) else op
        if isinstance(attention, Attention):
            if attention.layer in caches:
                raise CodegenError(f"step of {graph.model}: two nodes append to the cache {attention.layer}")
            caches.add(attention.layer)
        if name != graph.logits.node and not any(graph.network.successors(name)):
            raise CodegenError(f"step of {graph.model}: nothing reads {name} = {op}")
    if caches != set(range(len(caches))):
        raise CodegenError(f"step of {graph.model}: its caches are {sorted(caches)}, not one for each layer")


def _reads(op: Op) -> tuple[int, ...]:
    """Widths of the values an operation reads."""
    match op:
        case Token():
            return ()
        case Embed():
            return (0,)
        case Linear():
            return (op.weights[0].cols,) if len({weight.cols for weight in op.weights}) == 1 else ()
        case Attention() | Attend():
            attention = op.attention if isinstance(op, Attend) else op
            cached = attention.kv_heads * attention.head_dim
            return (attention.heads * attention.head_dim, cached, cached)
        case Gate() | Add():
            return (op.width, op.width)
        case Residual():
            return (op.norm.width, op.norm.width)
        case _:
            return op.outputs
