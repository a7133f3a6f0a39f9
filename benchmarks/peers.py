"""The other methods that benchmarks/quality.py measures, and how one is run.

A method is a script peer/peer_<method>.py, run in the peers' own virtual environment: their packages need not agree
with ours. All take the same arguments, MODEL BITS GROUP_SIZE WINDOWS OUTPUT, and answer as peer_output.py tells. The
scripts have a folder of their own, as what lies beside a script is imported first: a kernels.py would hide Hugging
Face's package of that name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-bench" / "bin" / "python"


@dataclass(frozen=True)
class Peer:
    """One setting of another method."""

    method: str
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.bits} bits g{self.group_size}"


@dataclass(frozen=True)
class PeerReport:
    """What a peer said of itself: all stored bits over the weights, wall seconds of the method, its cost, versions."""

    bits_per_weight: float
    seconds: float
    processor_seconds: float
    """Of the whole process, loading too; unlike wall time little moved by other work on the machine."""
    peak_rss_bytes: int | None
    versions: dict[str, str]


PEERS = (
    Peer("HQQ", 4, 64),
    Peer("HQQ", 3, 32),
    Peer("HQQ", 3, 64),
    Peer("HQQ", 2, 32),
    Peer("NF4", 4, 64),
    Peer("LoftQ", 4, 64),
    Peer("GPTQ", 4, 64),
    Peer("GPTQ", 3, 64),
    Peer("GPTQ", 2, 64),
    Peer("AWQ", 3, 64),
    Peer("AutoRound", 3, 64),
    Peer("AutoRound", 2, 64),
)


def wanted_peers() -> tuple[Peer, ...]:
    """PEERS, or those of the methods that the environment's PEERS names, such as HQQ,NF4."""
    methods = os.environ.get("PEERS")
    return tuple(peer for peer in PEERS if not methods or peer.method in methods.split(","))


def run_peer(peer: Peer, base_folder: Path, calibration: Path, output: Path) -> tuple[dict[str, Tensor], PeerReport]:
    """The dequantised weights of `peer` by parameter name, and its report.

    `base_folder` holds the model for transformers; `calibration` is a safetensors file with `windows`, int64
    [n, seqlen]; `output` is emptied before and removed after. Raises CalledProcessError where the process
    of the peer failed.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    script = ROOT / "benchmarks" / "peer" / f"peer_{peer.method.lower()}.py"
    settings = [str(base_folder), str(peer.bits), str(peer.group_size), str(calibration), str(output)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    subprocess.run([str(PYTHON), str(script), *settings], check=True, cwd=output, env=environment)
    report = PeerReport(**json.loads((output / "report.json").read_text(encoding="utf-8")))
    weights = load_file(output / "weights.safetensors")
    shutil.rmtree(output)
    return weights, report
