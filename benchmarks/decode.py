"""Speed of decoding and of reading a prompt on the CPU: reallm's artifacts compared with torch and llama.cpp.

    make bench NAME=decode [DEMO=demo] [ROUNDS=7] [THREADS=2,1]

Run after `make demo`; it uses that model (Q4_1 GGUF) and artifact. Two more artifacts store the embedding, which is
also the head, in fewer bits. Each contender reads PROMPT tokens and then decodes DECODED tokens greedily with
`generate` (llama.cpp: see peer_llama.py). The contenders take turns, ROUNDS times; the median of the rounds counts.
transformers runs the uncompressed model in bfloat16 and float32, and reads the long prompt in the first round only.
Tokens per second refer to wall time; with one thread also to processor time, which depends less on other work on the
machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from json import loads
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import reallm
from benchmarks.bench import Figure, machine
from benchmarks.peers import PYTHON, ROOT
from reallm.cli.demo import MODEL_FILE
from reallm.cli.tables import columns_table
from reallm.codegen.cpu.compiler import machine_tier
from reallm.kernels.storage.atomic import canonical_json, write_text_atomic
from reallm.models.loaded import load_model
from reallm.planner.tables.plan import Plan
from reallm.planner.tables.records import read_record

RESULTS = ROOT / "benchmarks" / "results" / "decode.json"
FOLDER = ROOT / ".bench" / "decode"
PROMPT, DECODED, PREFILL = 64, 48, 512
THREADS = tuple(map(int, (os.environ.get("THREADS") or "2,1").split(",")))
MEASURES = {n: f"{n} thread{'s' * (n > 1)}" for n in THREADS} | (
    {0: "1 thread, processor time"} if 1 in THREADS else {}
)
HEADS = ("int8-g64", "lm4-g64-dq6x64+ldl")
"""Formats of embedding and head, besides the one that the demo planned."""
BASE = "torch bfloat16"


Seconds = tuple[float, float]
"""(wall time, processor time)."""


@dataclass
class Contender:
    """A model to time: functions of the number of threads that return the seconds of decoding and of a prompt."""

    name: str
    decode: Callable[[int], Seconds]
    """Decodes DECODED tokens after PROMPT."""
    prefill: Callable[[int], Seconds]
    """Reads a prompt of PREFILL tokens."""
    bits: float
    """Bits per weight of the matrices inside the blocks."""
    seconds: dict[tuple[str, int], list[Seconds]] = field(default_factory=dict)
    """("decode" or "prefill", threads) -> times of all rounds."""

    def rate(self, what: str, threads: int) -> float:
        """Tokens per second in the median round; `threads` 0 means one thread in processor time."""
        count = DECODED if what == "decode" else PREFILL
        return count / statistics.median(taken[not threads] for taken in self.seconds[what, threads or 1])


class Clock:
    """A streamer that records when each token arrived."""

    def __init__(self) -> None:
        self.times: list[Seconds] = []

    def put(self, _: Tensor) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def between(self, first: int, last: int) -> Seconds:
        """The time from one token to another."""
        wall, processor = (end - start for start, end in zip(self.times[first], self.times[last], strict=True))
        return wall, processor

    def end(self) -> None:
        """Nothing to do."""


def generated(model: PreTrainedModel, prompt: int, tokens: int) -> Clock:
    """Generate `tokens` tokens; the clock has the time of the prompt and of each token."""
    clock = Clock()
    ids = 10 + torch.arange(prompt)[None] % 1000
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "streamer": clock}
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
    return clock


def ours(name: str, model: PreTrainedModel, bits: float) -> Contender:
    """A transformers model as a contender; the first token counts towards the time of the prompt."""

    def decode(threads: int) -> Seconds:
        torch.set_num_threads(threads)
        return generated(model, PROMPT, DECODED + 1).between(1, -1)

    def prefill(threads: int) -> Seconds:
        torch.set_num_threads(threads)
        return generated(model, PREFILL, 1).between(0, 1)

    return Contender(name, decode, prefill, bits)


def llama(model: Path, process: subprocess.Popen[str]) -> Contender:
    """llama.cpp as a contender; it runs in the separate process `process`."""

    def ask(request: str) -> Seconds:
        assert process.stdin and process.stdout
        process.stdin.write(f"{request}\n")
        process.stdin.flush()
        wall, processor = map(float, process.stdout.readline().split())
        return wall, processor

    def decode(threads: int) -> Seconds:
        return ask(f"decode {threads} {PROMPT} {DECODED}")

    return Contender("llama.cpp Q4_1", decode, lambda threads: ask(f"prefill {threads} {PREFILL}"), 5.0)


def artifacts(demo: Path) -> Iterator[Contender]:
    """The demo's artifact, and artifacts with the same matrices but other formats of the embedding."""
    plan = read_record(demo / "work" / "plan.json", Plan, "plan")
    model, _ = reallm.load(demo / "out", verify=False)
    yield ours(f"reallm {plan.bits_per_weight:.2f} bits", model, plan.bits_per_weight)
    same = [f"{choice.matrix}={choice.format}" for choice in plan.choices]
    for fmt in HEADS:
        folder, path = FOLDER / fmt, FOLDER / f"{fmt}.json"
        reallm.plan(demo / "work", budget="8bpw", pins=[*same, f"model.embed_tokens={fmt}"], output=path)
        if not folder.exists():
            reallm.compile(path, folder, kernels=False)
        model, _ = reallm.load(folder, verify=False)
        yield ours(f"reallm {plan.bits_per_weight:.2f} bits, head {fmt}", model, plan.bits_per_weight)


def torch_models(demo: Path) -> Iterator[Contender]:
    """The uncompressed model in bfloat16 and float32."""
    for name, dtype in ((BASE, torch.bfloat16), ("torch float32", torch.float32)):
        yield ours(name, load_model(demo / MODEL_FILE, dtype=dtype).model, 8.0 * dtype.itemsize)


def race(contenders: list[Contender], rounds: int, console: Console) -> None:
    """Time all contenders in turn, `rounds` times, after one warm-up round."""
    for turn in range(rounds + 1):
        for threads in THREADS:
            for each in contenders:
                for what, run in (("decode", each.decode), ("prefill", each.prefill)):
                    if what == "prefill" and turn != 1 and each.name.startswith("torch"):
                        continue  # takes several times longer than everything else
                    taken = run(threads)
                    if turn:
                        each.seconds.setdefault((what, threads), []).append(taken)
        console.print(f"round {turn} of {rounds}", highlight=False)


def rows(contenders: list[Contender], versions: dict[str, str]) -> Iterator[Figure]:
    """Each of ours beside each peer, in tokens per second: more is better."""
    mine = [each for each in contenders if each.name.startswith("reallm")]
    for what, threads in ((what, threads) for what in ("decode", "prefill") for threads in MEASURES):
        for contender in mine:
            for peer in contenders:
                if peer not in mine:
                    a, b = contender.rate(what, threads), peer.rate(what, threads)
                    tokens = f"{DECODED} tokens after {PROMPT}" if what == "decode" else f"{PREFILL} tokens of prompt"
                    figure = f"{what}, {tokens}, {MEASURES[threads]}: {contender.name}"
                    yield Figure(figure, "tokens/s", a, peer.name, b, a / b, versions, machine())


def main() -> None:
    """Run, write and print."""
    console, demo = Console(), Path(os.environ.get("DEMO") or "demo")
    FOLDER.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("reallm", "torch", "transformers")} | {"tier": machine_tier()}
    command = [str(PYTHON), str(ROOT / "benchmarks" / "peer" / "peer_llama.py"), str(demo / MODEL_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        versions |= loads(process.stdout.readline())
        contenders = [*artifacts(demo), *torch_models(demo), llama(demo / MODEL_FILE, process)]
        race(contenders, int(os.environ.get("ROUNDS") or 7), console)
        process.stdin.close()
    figures = list(rows(contenders, versions))
    write_text_atomic(RESULTS, canonical_json([asdict(row) for row in figures]))
    lines = [
        [each.name, f"{each.bits:.2f}", *(f"{each.rate(w, t):.1f}" for w in ("decode", "prefill") for t in MEASURES)]
        for each in contenders
    ]
    heads = ("", "bits", *(f"{w}, {label}" for w in ("decode", "prefill") for label in MEASURES.values()))
    console.print(columns_table(f"tokens per second on {machine()}", heads, lines))


if __name__ == "__main__":
    main()
