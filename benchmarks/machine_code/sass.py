"""Reads the machine code of NVIDIA GPUs with the tools that come with Triton, checks it and counts its instructions.

A loop is a range of code whose last branch jumps back to its beginning. Instructions are counted per thread: those
outside loops count once, those of a loop count as often as the caller says that the loop runs.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reallm.codegen.ir.operations import CodegenError

MAX_REGISTERS = 128
"""Maximum number of registers per thread with which 16 warps fit on a multiprocessor, which has 65536."""
MAX_SHARED_BYTES = 49152
"""Shared memory in bytes that a kernel instance gets on every GPU without opting in to more."""
NARROW_BITS = 16
"""A load of this many bits per thread, or fewer, is called narrow."""
_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_ATOMIC = ("ATOM", "ATOMG", "ATOMS", "RED")
_LOAD_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Usage:
    """Resources that a kernel uses: registers per thread, bytes of stack, of shared and of local memory."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


@dataclass(frozen=True)
class Code:
    """The opcodes of one kernel in order, its innermost loops as (first, end), and the loops around these."""

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    usage: Usage
    outer: tuple[tuple[int, int], ...] = ()

    def count(self, turns: Sequence[float]) -> float:
        """Number of instructions that a thread runs if loop i, in the order of the code, runs `turns[i]` times.

        Raises CodegenError unless `turns` has one entry for each loop.
        """
        if len(turns) != len(self.loops):
            raise CodegenError(f"the code has {len(self.loops)} loops, not {len(turns)}")
        inside = [end - first for first, end in self.loops]
        return len(self.opcodes) - sum(inside) + sum(n * turn for n, turn in zip(inside, turns, strict=True))

    def histogram(self) -> Counter[str]:
        """The number of instructions of each kind."""
        return Counter(opcode.split(".")[0] for opcode in self.opcodes)


def tool(name: str) -> Path:
    """The path of one of CUDA's binary utilities in Triton's package. Raises CodegenError if Triton is missing."""
    package = importlib.util.find_spec("triton")
    if package is None or package.origin is None:
        raise CodegenError("reading machine code needs Triton, whose wheel contains cuobjdump and nvdisasm")
    return Path(package.origin).parent / "backends" / "nvidia" / "bin" / name


def read_code(path: Path) -> Code:
    """The code of the only kernel in the object file at `path`. Raises CodegenError if it cannot be read."""
    return parse_listing(listing(path))


def listing(path: Path) -> str:
    """The resources and the disassembly of the only kernel in the object file at `path`, as text."""
    return _output(["cuobjdump", "-res-usage", str(path)]) + _output(["nvdisasm", "-c", str(path)])


def parse_listing(text: str) -> Code:
    """The code in a `text` that `listing` has printed. Raises CodegenError if the resources are missing."""
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if resources is None:
        raise CodegenError("cuobjdump lists no resources of the kernel")
    return parse_code(text, Usage(*(int(value) for value in resources.groups())))


def _output(command: list[str]) -> str:
    done = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CodegenError(f"{command[0]} failed: {done.stderr.strip()[:200]}")
    return done.stdout + done.stderr


def parse_code(text: str, usage: Usage) -> Code:
    """The code in a `text` that nvdisasm has printed, without the padding after the last instruction."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif (found := _LINE.match(line)) and (opcode := _OPCODE.match(found[1])):
            opcodes.append(opcode[1])
            branch = _BRANCH.search(found[1])
            if branch and branch[1] in labels:
                spans.append((labels[branch[1]], len(opcodes)))
    end = len(opcodes)
    while end and opcodes[end - 1] == "NOP":
        end -= 1
    if end and opcodes[end - 1] == "BRA":  # the endless loop after a kernel's last EXIT
        end -= 1
    spans = [span for span in spans if span[1] <= end]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    outer = sorted({*spans} - {*inner})
    return Code(tuple(opcodes[:end]), tuple(sorted(inner)), usage, tuple(outer))


def load_bits(opcode: str) -> int:
    """Number of bits that a thread loads from global memory with `opcode`; 0 for other instructions."""
    parts = opcode.split(".")
    if parts[0] not in ("LDG", "LD"):
        return 0
    return next((_LOAD_BITS[part] for part in parts if part in _LOAD_BITS), 32)


def lint(code: Code, product: bool = True) -> tuple[str, ...]:
    """Descriptions of the faults in a kernel's code; empty if there are none.

    Faults are spills, local memory, atomics, too many registers and too much shared memory. Narrow loads inside loops
    are faults too if the kernel is a `product`, that is, if it reads codes.
    """
    usage, faults = code.usage, []
    if usage.stack_bytes or usage.local_bytes:
        faults.append(f"{usage.stack_bytes} bytes of stack and {usage.local_bytes} of local memory")
    if spilled := [opcode for opcode in code.opcodes if opcode.startswith(("STL", "LDL"))]:
        faults.append(f"{len(spilled)} spills")
    if usage.registers > MAX_REGISTERS:
        faults.append(f"{usage.registers} registers, more than {MAX_REGISTERS}")
    if usage.shared_bytes > MAX_SHARED_BYTES:
        faults.append(f"{usage.shared_bytes} bytes of shared memory, more than {MAX_SHARED_BYTES}")
    for first, end in code.loops if product else ():
        bits = [load_bits(opcode) for opcode in code.opcodes[first:end] if load_bits(opcode)]
        narrow = sum(b for b in bits if b <= NARROW_BITS)
        if narrow * 4 > sum(bits):
            faults.append(f"narrow loads carry {narrow} of the {sum(bits)} bits of a loop")
    if atomics := [opcode for opcode in code.opcodes if opcode.split(".")[0] in _ATOMIC]:
        faults.append(f"{len(atomics)} atomic operations: sums would depend on the order of instances")
    return tuple(faults)
