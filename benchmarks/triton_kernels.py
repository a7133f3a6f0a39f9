"""The generated Triton kernels compared with gemlite's and AQLM's: instructions per weight, or times on a GPU.

    make bench NAME=triton_kernels

All kernels are compiled by the same Triton for SHAPE and one row of x in bf16 or half precision. Without a GPU the
machine code is counted: instructions of all threads, with every turn of the loops, divided by the number of weights.
For gemlite's gemv_revsplitK the best of its own list of settings counts, for AQLM's kernel the best of 1 to 8 warps. q,
k and v of one layer are also counted, multiplied by one launch and by three. The lint of our machine code must be
clean, otherwise nothing is reported. With a GPU everything is timed instead (`gpu_kernels`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.bench import Figure, machine
from benchmarks.machine_code.cost import Cost, product_cost
from benchmarks.machine_code.sass import lint, read_code
from benchmarks.peers import PYTHON, ROOT
from reallm.cli.tables import columns_table
from reallm.codegen.artifact.build import compile_kernels
from reallm.codegen.ir.program import KernelSpec
from reallm.codegen.launch.grouped import Member, program_of
from reallm.codegen.launch.instances import splits_for
from reallm.codegen.launch.launch import kernels_for
from reallm.codegen.triton.emit import emit
from reallm.kernels.formats.codecs import TrellisCodec
from reallm.kernels.formats.formats import Format
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic

RESULTS = ROOT / "benchmarks" / "results" / "triton_kernels.json"
TIMED = RESULTS.with_name("gpu_kernels.json")
SHAPE = (4096, 4096)
TARGET = "sm_80"
OURS = {
    2: ("tq2-l12+ldl2+rot", "uint2-g64", "lm2-g64"),
    3: ("tq3-l12+ldl2+rot", "uint3-g64", "lm3-g64"),
    4: ("tq4-l12+ldl2+rot", "uint4-g64", "lm4-g64"),
}
JOINED = ("tq2-l12+ldl2+rot", "tq3-l12+ldl2+rot", "tq4-l12+ldl2+rot", "lm3-g64", "uint4-g64")
JOINED_ROWS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}
"""Rows of the matrices of LLaMA-3-8B; their columns are those of SHAPE."""
PEERS = {2: ("gemlite 2", "aqlm 2x8"), 3: ("aqlm 2x12",), 4: ("gemlite 4", "aqlm 4x8")}
"""Bits -> peers. gemlite does not have three bits, and AQLM's kernel needs a power of two of codebooks."""


@dataclass(frozen=True)
class Row(Figure):
    """A figure, with a note on our kernel."""

    note: str


@dataclass(frozen=True)
class Product:
    """A kernel to count: one matrix's, or a group's, whose `rows` are those of all its matrices together."""

    format: str
    rows: int
    spec: KernelSpec


def core(name: str, rows: int = SHAPE[0]) -> Product:
    """The kernel that decodes and multiplies the format `name`."""
    specs = kernels_for(Format.parse(name), rows, SHAPE[1])
    return Product(name, rows, next(spec for spec in specs if spec.function == "gemv"))


def joined(name: str) -> Product:
    """The kernel that multiplies all matrices of JOINED_ROWS in one launch."""
    members = (Member(matrix, Format.parse(name), rows, SHAPE[1], False) for matrix, rows in JOINED_ROWS.items())
    return Product(name, sum(JOINED_ROWS.values()), program_of(tuple(members), False).groups[0].kernel)


def our_costs(products: list[Product]) -> dict[Product, tuple[Cost, str]]:
    """Cost of each product's kernel, and a note from cuobjdump. Raises RuntimeError where the lint finds a fault."""
    costs = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        specs = sorted({product.spec for product in products}, key=lambda spec: spec.name)
        for spec in specs:
            (folder / f"{spec.name}.py").write_text(emit(spec), encoding="utf-8")
        compile_kernels(specs, folder, [TARGET], "bf16")
        for product in products:
            spec, shape = product.spec, (product.rows, SHAPE[1])
            code, fmt = read_code(folder / f"{spec.name}.{TARGET}.cubin"), Format.parse(product.format)
            if faults := lint(code):
                raise RuntimeError(f"{spec.name}: {'; '.join(faults)}")
            width = fmt.codec.eighths // 4 if isinstance(fmt.codec, TrellisCodec) else 0
            cost = product_cost(spec, code, fmt, *shape, splits_for(spec, *shape, 1), width)
            note = f"{code.usage.registers} registers, {cost.moved_over_packed:.3f} x packed bytes moved"
            costs[product] = cost, note
    return costs


def peer_costs() -> dict[str, tuple[float, str, dict[str, str]]]:
    """Peer -> the fewest instructions per weight among its settings, that setting, and versions."""
    names = sorted({name for names in PEERS.values() for name in names})
    python, script = os.environ.get("PEER_PYTHON") or str(PYTHON), ROOT / "benchmarks" / "peer" / "peer_triton.py"
    costs: dict[str, tuple[float, str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}
        environment.pop("PYTHONPATH", None)
        subprocess.run([python, str(script), json.dumps(SHAPE), scratch, *names], check=True, env=environment)
        for entry in json.loads(Path(scratch, "kernels.json").read_text(encoding="utf-8")):
            if entry["versions"]["triton"] != version("triton"):
                raise RuntimeError(f"the peers have Triton {entry['versions']['triton']}, not {version('triton')}")
            code = read_code(Path(scratch, entry["file"]))
            value = code.count([1.0] * len(code.loops)) * entry["threads"] / entry["weights"]
            best = costs.get(entry["name"])
            if best is None or value < best[0]:
                costs[entry["name"]] = value, entry["note"], entry["versions"]
    return costs


def counted() -> Iterator[Row]:
    """Rows of instructions per weight, ours beside each peer's."""
    singles = {name: core(name) for names in OURS.values() for name in names}
    layers = {name: (joined(name), [core(name, rows) for rows in JOINED_ROWS.values()]) for name in JOINED}
    ours = our_costs([*singles.values(), *(p for one, three in layers.values() for p in (one, *three))])
    theirs = peer_costs()
    versions = {"reallm": version("reallm"), "triton": version("triton")}
    for bits, names in OURS.items():
        for name in names:
            cost, note = ours[singles[name]]
            for peer in PEERS[bits]:
                value, setting, peer_versions = theirs[peer]
                yield Row(
                    f"{name} of {SHAPE[0]} x {SHAPE[1]}, {TARGET}",
                    "instructions per weight",
                    cost.instructions_per_weight,
                    f"{peer} bits" if peer.startswith("gemlite") else peer,
                    value,
                    cost.instructions_per_weight / value,
                    versions | peer_versions,
                    machine(),
                    f"{note}; its setting {setting}",
                )
    for name, (one, three) in layers.items():
        cost, note = ours[one]
        apart = sum(ours[product][0].instructions_per_weight * product.rows for product in three) / one.rows
        figure = f"{name}: q, k, v of {', '.join(map(str, JOINED_ROWS.values()))} x {SHAPE[1]} together, {TARGET}"
        value = cost.instructions_per_weight
        unit, peer = "instructions per weight", "three launches"
        yield Row(figure, unit, value, peer, apart, value / apart, versions, machine(), note)


def main() -> None:
    """Count or time, write and print."""
    done = []
    if torch.cuda.is_available():
        from benchmarks.gpu_kernels import timed

        rows, results = (Row(**asdict(figure), note=note) for figure, note in timed()), TIMED
    else:
        rows, results = counted(), RESULTS
    for row in rows:
        done.append(row)
        write_text_atomic(results, canonical_json([asdict(r) for r in done]))
    lines = [[r.figure, f"{r.ours:.2f}", r.peer_name, f"{r.peer:.2f}", f"{r.ratio:.2f}", r.note] for r in done]
    headings = ("figure", done[0].unit, "beside", "its", "ratio", "note")
    Console(width=220).print(columns_table(f"Triton kernels on {machine()}", headings, lines))


if __name__ == "__main__":
    sys.exit(main())
