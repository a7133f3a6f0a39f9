"""The peers of the quality benchmark alone, cached for a later `make bench NAME=quality` with the same settings.

make bench NAME=quality_peers [MODEL=...] [TEXT=calibration] [TEST=held-out]
"""

from __future__ import annotations

from rich.console import Console

from benchmarks.bench import bench_from_environment
from benchmarks.peers import wanted_peers
from reallm.cli.tables import columns_table


def main() -> None:
    """Run the peers without a cached result and print all results."""
    console, lines = Console(), []
    bench = bench_from_environment(console)
    for peer in wanted_peers():
        result = bench.peer(peer)
        seconds = "" if result.processor_seconds is None else f"{result.processor_seconds:.0f}"
        gib = "" if result.peak_rss_bytes is None else f"{result.peak_rss_bytes / 2**30:.2f}"
        lines.append(
            [peer.name, f"{result.bits_per_weight:.3f}", f"{result.kl:.4f}", f"{result.perplexity:.2f}", seconds, gib]
        )
    headings = ("peer", "bits per weight", "KL", "perplexity", "processor s", "peak GiB")
    console.print(columns_table(f"peers, cached in {bench.folder / 'results'}", headings, lines))


if __name__ == "__main__":
    main()
