"""The C++ of a decode step: graph -> buffers -> blocks -> one translation unit over kernels/native/step/step.hpp.

    step(run, tokens, logits)     passes `tokens`, which start at run.position, through the model and writes the logits
                                  of the last one

Values live in buffers (`buffers`) of one scratch area; every layer uses the same buffers. An operation may write its
result over an input that nothing reads later, if the widths agree. Layers that then consist of the same lines become
one function, which is called once per layer with the positions of the layer's weights. Matrices are reached through
their Operand (kernels/native/linear/linear.hpp), so the source does not depend on how they are stored, except for
matrices that need their input in the order of their stored columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from reallm.codegen.ir.operations import CodegenError

from .buffers import Buffers
from .graph import StepGraph, Value
from .operations import Add, Attend, Embed, Gate, Linear, Norm, Operation, Residual, Softcap, Token, Weight
from .program import CacheDtype, StepProgram

CACHE_TYPES: dict[CacheDtype, str] = {"f32": "float", "bf16": "Bf16"}


@dataclass
class _Block:
    """Consecutive operations that become one function, in which weights and vectors are numbered from 0."""

    lines: list[str] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    layer: int = 0

    @property
    def text(self) -> str:
        return "\n".join(f"  {line}" for line in self.lines)


def emit_step(graph: StepGraph, cache: CacheDtype = "f32") -> StepProgram:
    """The program of a `graph` that the passes have rewritten; `cache` is the dtype of cached keys and values.

    Raises CodegenError for an operation that the passes should have removed.
    """
    return _Emission(graph, cache).program()


class _Emission:
    def __init__(self, graph: StepGraph, cache: CacheDtype) -> None:
        self.graph, self.cache = graph, cache
        self.order = [(name, op) for name, op in graph if not isinstance(op, Token)]
        self.buffers = Buffers(graph, self.order)
        self.blocks: list[_Block] = []
        self.tables: list[str] = []
        self.heads: set[tuple[int, int]] = set()
        self.layers = 0

    def program(self) -> StepProgram:
        for indices in _segments(self.order):
            self.blocks.append(_Block())
            for index in indices:
                self.emit(index, *self.order[index])
        weights = tuple(weight for block in self.blocks for weight in block.weights)
        if len(self.heads) != 1:
            raise CodegenError(f"the layers of {self.graph.model} differ in heads; the cache needs equal heads")
        ((kv_heads, head_dim),) = self.heads
        return StepProgram(
            source=self.source(),
            weights=weights,
            vectors=tuple(vector for block in self.blocks for vector in block.vectors),
            tables=tuple(self.tables),
            scratch=self.buffers.total,
            layers=self.layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            cache=self.cache,
        )

    def emit(self, index: int, name: str, op: Operation) -> None:
        """Append the line of one operation to the current block."""
        emitters: dict[type, Callable[[int, str, Operation], str]] = {
            Embed: self._embed,
            Norm: self._norm,
            Residual: self._residual,
            Add: self._add,
            Gate: self._gate,
            Linear: self._linear,
            Attend: self._attend,
            Softcap: self._softcap,
        }
        if type(op) not in emitters:
            raise CodegenError(f"{name} = {op} cannot be written as C++; run the passes first")
        line = emitters[type(op)](index, name, op)
        self.blocks[-1].lines.append(line)
        self.buffers.release(index, name)

    def _read(self, value: Value) -> str:
        return f"at(run, {self.buffers.places[value]})"

    def _write(self, index: int, value: Value, replaced: Value | None = None) -> str:
        return f"at(run, {self.buffers.take(index, value, replaced)})"

    def _vector(self, norm: Norm) -> str:
        self.blocks[-1].vectors.append(norm.weight)
        return f"n + {len(self.blocks[-1].vectors) - 1}"

    def _weights(self, *weights: Weight) -> str:
        block = self.blocks[-1]
        block.weights += weights
        return f"w + {len(block.weights) - len(weights)}"

    def _order(self, index: int, reader: str) -> str:
        """The last argument of an operation that writes in the order of the stored columns of `reader`.

        `reader` is a matrix of a later operation; the argument is empty without one.
        """
        if not reader:
            return ""
        later = [weight.name for _, op in self.order[index:] if isinstance(op, Linear) for weight in op.weights]
        return f", run.orders[w + {len(self.blocks[-1].weights) + later.index(reader)}]"

    def _embed(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Embed)
        return f"embed(run, {self._weights(op.weight)}, tokens, {_f(op.scale)}, {self._write(index, Value(name))});"

    def _norm(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Norm)
        if op.groups > 1:
            raise CodegenError(f"{name} = {op} belongs inside an attention; run the passes first")
        x = self._read(self.graph.inputs(name)[0])
        y = self._write(index, Value(name), self.graph.inputs(name)[0])
        return f"norm<{op.width}, {_b(op.plus_one)}>(run, {self._vector(op)}, {_f(op.eps)}, {x}, {y});"

    def _residual(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Residual)
        h, y = self.graph.inputs(name)
        reads = f"{self._read(h)}, {self._read(y)}"
        total, normed = self._write(index, Value(name), h), self._write(index, Value(name, 1), y)
        kind = 0 if op.post is None else 1 + op.post.plus_one
        post = f"{self._vector(op.post)}, {_f(op.post.eps)}" if op.post else "0, 0"
        head = f"residual<{op.norm.width}, {_b(op.norm.plus_one)}, {kind}>"
        return f"{head}(run, {self._vector(op.norm)}, {_f(op.norm.eps)}, {post}, {reads}, {total}, {normed});"

    def _add(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Add)
        a, b = self.graph.inputs(name)
        return f"add<{op.width}>(run, {self._read(a)}, {self._read(b)}, {self._write(index, Value(name), a)});"

    def _gate(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Gate)
        a, b = self.graph.inputs(name)
        reads = f"{self._read(a)}, {self._read(b)}"
        result = self._write(index, Value(name), a)
        function = "gate_in_order" if op.order else "gate"
        return f"{function}<{op.width}>(run, {reads}, {result}, {op.activation}{self._order(index, op.order)});"

    def _linear(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Linear)
        x, weights = self._read(self.graph.inputs(name)[0]), self._weights(*op.weights)
        values = [Value(name, port) for port in range(len(op.weights))]
        if self.graph.logits.node == name or any(
            isinstance(self.graph.op(node), Softcap) for node, _ in self.graph.readers(values[0])
        ):
            self.buffers.places[values[0]] = -1
            return f"head(run, {weights}, {op.weights[0].cols}, {x}, prepared(run), logits);"
        outputs = ", ".join(self._write(index, value) for value in values)
        return f"linear(run, {weights}, {x}, prepared(run), {{{outputs}}});"

    def _attend(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Attend)
        inner = op.attention
        self.heads.add((inner.kv_heads, inner.head_dim))
        self.blocks[-1].layer, self.layers = inner.layer, self.layers + 1
        if op.table not in self.tables:
            self.tables.append(op.table)
        table = 2 * self.tables.index(op.table)
        kinds, vectors, eps = [], [], []
        for norm in (op.query_norm, op.key_norm):
            kinds.append("0" if norm is None else str(1 + norm.plus_one))
            vectors.append("nullptr" if norm is None else f"run.vectors[{self._vector(norm)}]")
            eps.append("0" if norm is None else _f(norm.eps))
        shape = ", ".join([str(inner.heads), str(inner.kv_heads), str(inner.head_dim), *kinds, "Cache"])
        shape += ", true" if op.order else ""
        reads = ", ".join(self._read(value) for value in self.graph.inputs(name))
        numbers = ", ".join([*vectors, *eps, _f(inner.scale), "layer", str(inner.window or 0), _f(inner.softcap or 0)])
        angles = f"run.angles[{table}], run.angles[{table + 1}]"
        result = f"{self._write(index, Value(name))}{self._order(index, op.order)}"
        return f"Attend<{shape}>{{run, {reads}, {angles}, {numbers}, {result}}}();"

    def _softcap(self, index: int, name: str, op: Operation) -> str:
        assert isinstance(op, Softcap)
        if name != self.graph.logits.node:
            raise CodegenError(f"{name} = {op}: only the logits can be capped by a separate node")
        return f"softcap(logits, {op.width}, {_f(op.cap)});"

    def source(self) -> str:
        """The whole translation unit."""
        texts = list(dict.fromkeys(block.text for block in self.blocks))
        functions = "\n\n".join(
            f"{_SIGNATURE.format(number=number)} {{\n{text}\n}}" for number, text in enumerate(texts)
        )
        calls = "\n".join(self._calls(texts))
        return _SOURCE.format(
            functions=functions,
            calls=calls,
            cache=CACHE_TYPES[self.cache],
            scratch=self.buffers.total,
        )

    def _calls(self, texts: list[str]) -> Iterator[str]:
        """Lines that call the blocks: one loop for each series of consecutive blocks with the same text."""
        weights = vectors = 0
        for text, run in groupby(self.blocks, key=lambda block: block.text):
            same = list(run)
            number, count = texts.index(text), len(same)
            dw, dn, layer = len(same[0].weights), len(same[0].vectors), same[0].layer
            if [block.layer for block in same] != list(range(layer, layer + count)) and count > 1:
                raise CodegenError(f"the layers of {self.graph.model} are not in order")
            place = f"{weights} + i * {dw}, {vectors} + i * {dn}, {layer} + i"
            yield f"  for (int i = 0; i < {count}; i++) block{number}(run, {place}, tokens, logits);"
            weights, vectors = weights + count * dw, vectors + count * dn


def _segments(order: Sequence[tuple[str, Operation]]) -> Iterator[list[int]]:
    """Indices of the operations of each block.

    Blocks end where the layer changes, and after the norm that begins a layer, so that all layers look the same.
    """
    segment: list[int] = []
    for index, (name, op) in enumerate(order):
        opens = name.partition(".")[0] != order[index - 1][0].partition(".")[0] if index else False
        after_norm = index > 0 and isinstance(order[index - 1][1], Norm) and isinstance(op, Linear)
        if segment and (opens or after_norm):
            yield segment
            segment = []
        segment.append(index)
    yield segment


def _f(value: float) -> str:
    """A C++ literal of the float32 nearest to `value`."""
    return f"float({value!r})"


def _b(value: bool) -> str:
    return "true" if value else "false"


_SIGNATURE = "void block{number}(const Run& run, int w, int n, int64_t layer, const int64_t* tokens, float* logits)"

_SOURCE = """\
// Generated by reallm: the decode step of a model.
#include "step.hpp"

using namespace reallm;
using namespace reallm::step;

namespace {{

using Cache = {cache};

float* at(const Run& run, int64_t offset) {{ return run.scratch + run.tokens * offset; }}
float* prepared(const Run& run) {{ return at(run, {scratch}); }}

// The logits of the last token.
void head(const Run& run, int w, int64_t cols, const float* x, float* xc, float* logits) {{
  Run last = run;
  last.tokens = 1;
  linear(last, w, x + (run.tokens - 1) * cols, xc, {{logits}});
}}

{functions}

}}  // namespace

extern "C" int64_t reallm_step_abi() {{ return sizeof(Run) * 65536 + sizeof(Operand); }}

extern "C" void reallm_step(const Run* given, const int64_t* tokens, float* logits) {{
  const Run& run = *given;
{calls}
}}
"""
