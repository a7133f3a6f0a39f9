"""Machine code of the Triton search for closed walks: compiled for a GPU that need not be present, and counted.

The kernel has one loop of the search's steps, inside a loop of words of back pointers, inside a loop of the two passes,
inside a loop of tiles. The walk back is a loop of its own in each pass; the compiler unrolls it by four, with a second
loop for the remaining steps. Every instruction counts as often as the loops around it turn for one tile.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reallm.codecs.trellis.device_search import warps, words_per_group
from reallm.codecs.trellis.triton_search import SEAM_STEPS, search
from reallm.codegen.ir.operations import CodegenError
from reallm.kernels.codes.trellis import TILE_WEIGHTS, step_shape

from .sass import Code, read_code

ALU = ("IMNMX", "VIMNMX", "VIMNMX3", "LEA", "SHF", "LOP3", "IADD3", "VIADD", "SEL", "ISETP", "PRMT", "SGXT", "IABS")
"""Instructions of the integer pipe, which starts half a warp per cycle."""
_POINTERS = {"code": "*i32", "goal": "*i32", "pointers": "*i32", "states": "*i32"}
_POINTERS |= dict.fromkeys(("target", "decoded", "below", "error", "values"), "*fp32")
_NUMBERS = {"tiles": "i32", "limit": "fp32", "factor": "fp32"}
UNROLLED = 4
"""Steps of the walk back in one turn of its unrolled loop."""


@dataclass(frozen=True)
class SearchCost:
    """The cost of the search for one trellis on one GPU, without feedback between tiles."""

    instructions_per_weight: float
    """Instructions of all threads."""
    alu_per_weight: float
    """Those of them that need the integer pipe."""
    pointer_bytes_per_weight: float
    """Bytes of back pointers that are written."""
    registers: int
    shared_bytes: int
    spilled_bytes: int


def compile_search(architecture: int, state_bits: int, width: int, feedback: bool = False) -> tuple[Code, int]:
    """(machine code, bytes of shared memory) of the search for a GPU of compute capability `architecture` / 10."""
    values, bits, _ = step_shape(width)
    types = _POINTERS | _NUMBERS
    signature = {name: types.get(name, "constexpr") for name in search.arg_names}
    constants = {"STATE_BITS": state_bits, "BITS": bits, "VALUES": values, "FEEDBACK": feedback}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(search.arg_names) if name in _POINTERS}
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    compiled = triton.compile(
        ASTSource(search, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps(state_bits), "enable_fp_fusion": False},
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "search.cubin")
        path.write_bytes(compiled.asm["cubin"])
        return read_code(path), compiled.metadata.shared


def search_cost(architecture: int, state_bits: int, width: int) -> SearchCost:
    """The cost of the search, from its machine code. Raises CodegenError for loops of an unknown form."""
    code, shared = compile_search(architecture, state_bits, width)
    turns = _turns(code, width)
    share = 32 * warps(state_bits) / TILE_WEIGHTS  # threads for each weight
    alu = sum(n for opcode, n in zip(code.opcodes, turns, strict=True) if opcode.split(".")[0] in ALU)
    _, bits, _ = step_shape(width)
    words = _words(width)
    pointer_bytes = 4 * words * (1 << (state_bits - bits)) / TILE_WEIGHTS
    spilled = code.usage.stack_bytes + code.usage.local_bytes
    return SearchCost(sum(turns) * share, alu * share, pointer_bytes, code.usage.registers, shared, spilled)


def _words(width: int) -> int:
    """Words of back pointers of one group, for both passes."""
    _, bits, _ = step_shape(width)
    return words_per_group(width) + -(-SEAM_STEPS.value // (32 // bits))


def _turns(code: Code, width: int) -> list[float]:
    """How often a thread runs each instruction of `code` for one tile."""
    _, _, steps = step_shape(width)
    seam = int(SEAM_STEPS.value)
    back = (steps - 1, seam - 1 - seam // 2)  # in the closed walk, and up to the middle of the seam
    # the loop of steps is the one that compares metrics
    compares = [sum("MNMX" in opcode for opcode in code.opcodes[first:end]) for first, end in code.loops]
    stepping = code.loops[max(range(len(compares)), key=compares.__getitem__)]
    loops: dict[tuple[int, int], float] = {stepping: steps + seam}
    for span in code.loops:
        stores = sum(opcode.startswith("STG") for opcode in code.opcodes[span[0] : span[1]])
        if span != stepping and stores == UNROLLED:
            loops[span] = sum(count // UNROLLED for count in back)
        elif span != stepping and stores == 1:
            loops[span] = sum(count % UNROLLED for count in back)
        elif span != stepping:
            raise CodegenError(f"the search has a loop with {stores} stores; expected 1 or {UNROLLED}")
    around = sorted((s for s in code.outer if s[0] <= stepping[0] and stepping[1] <= s[1]), key=lambda s: s[1] - s[0])
    if len(around) != 3:
        raise CodegenError(f"the search has {len(around)} loops around that of its steps; expected 3")
    loops |= dict(zip(around, (float(_words(width)), 2.0, 1.0), strict=True))
    return _innermost(len(code.opcodes), loops, around[-1])


def _innermost(count: int, loops: Mapping[tuple[int, int], float], tiles: tuple[int, int]) -> list[float]:
    """The turns of the innermost loop around each of `count` instructions; 0 outside of the loop of `tiles`."""
    turns = [0.0] * count
    for first, end in sorted(loops, key=lambda span: span[0] - span[1]):  # the widest first
        turns[first:end] = [loops[first, end]] * (end - first)
    return turns
