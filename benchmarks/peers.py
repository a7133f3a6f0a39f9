"""The other methods that benchmarks/quality.py measures, and how they are run.

A method is a script peer/peer_<method>.py, run in the peers' own virtual environment, whose package versions may differ
from ours. All scripts take the arguments MODEL BITS GROUP_SIZE WINDOWS OUTPUT and write files as described in
peer_output.py. They are in a separate folder because Python imports files beside a script first: our kernels.py would
hide Hugging Face's package of that name.
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
        """Method, bits and group size, as in the results."""
        return f"{self.method} {self.bits} bits g{self.group_size}"


@dataclass(frozen=True)
class PeerReport:
    """What the script of a peer reports."""

    bits_per_weight: float
    """All stored bits divided by the number of weights."""
    seconds: float
    """Wall time of the method."""
    processor_seconds: float
    """Processor time of the whole process, with loading; it depends less on other work on the machine."""
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
    """PEERS, or only those whose method is in the environment variable PEERS, such as HQQ,NF4."""
    methods = os.environ.get("PEERS")
    return tuple(peer for peer in PEERS if not methods or peer.method in methods.split(","))


def run_peer(peer: Peer, base_folder: Path, calibration: Path, output: Path) -> tuple[dict[str, Tensor], PeerReport]:
    """Run `peer`; returns its dequantised weights by parameter name, and its report.

    `base_folder` holds the model in transformers' format, `calibration` is a safetensors file with `windows`, int64
    [n, seqlen]. `output` is a scratch folder that is emptied before and removed after. Raises CalledProcessError when
    the peer's process fails.
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
