"""Shared by the scripts of the peers, which import it in .venv-bench: the files that they write.

A peer writes weights.safetensors, the dequantised decoder linears by parameter name, and report.json with bits per
weight, seconds of the method, processor seconds of the whole process, peak memory and versions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

FLOAT_BITS = 16
"""Bits of a scale that is stored as fp16."""


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name, module) of the decoder linears; no method quantises the head here."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module


def require_levels(name: str, weight: torch.Tensor, bits: int, group_size: int) -> None:
    """Exit unless each of the first 64 groups of `weight` [N, K] has at most 2^bits distinct values."""
    groups = weight.reshape(-1, group_size)[:64]
    if max(len(group.unique()) for group in groups) > 1 << bits:
        raise SystemExit(f"{name} is not quantised to {bits} bits")


def peak_rss_bytes() -> int | None:
    """This process's peak memory on Linux; getrusage would also count the peak of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def write_output(
    output: Path,
    weights: dict[str, torch.Tensor],
    stored_bits: int,
    seconds: float,
    packages: tuple[str, ...],
    norms: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write both files. `stored_bits` is the total for `weights`; `norms` were changed too, at no extra bytes."""
    report = {
        "bits_per_weight": stored_bits / sum(weight.numel() for weight in weights.values()),
        "seconds": seconds,
        "processor_seconds": time.process_time(),
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": {name: version(name) for name in (*packages, "torch", "transformers")},
    }
    changed = weights | (norms or {})
    save_file({name: weight.contiguous() for name, weight in changed.items()}, output / "weights.safetensors")
    (output / "report.json").write_text(json.dumps(report))
