"""The peers of the quality benchmark alone, each kept for a later `make bench NAME=quality` of the same settings.

make bench NAME=quality_peers [MODEL=...] [TEXT=calibration] [TEST=held-out]
"""

from __future__ import annotations

from rich.console import Console

from benchmarks.bench import bench_from_environment
from benchmarks.peers import wanted_peers
from reallm.cli.tables import columns_table


def main() -> None:
    """Run the peers that are missing and print them all."""
    console, lines = Console(), []
    bench = bench_from_environment(console)
    for peer in wanted_peers():
        found = bench.peer(peer)
        seconds = "" if found.processor_seconds is None else f"{found.processor_seconds:.0f}"
        gib = "" if found.peak_rss_bytes is None else f"{found.peak_rss_bytes / 2**30:.2f}"
        lines.append(
            [peer.name, f"{found.bits_per_weight:.3f}", f"{found.kl:.4f}", f"{found.perplexity:.2f}", seconds, gib]
        )
    headings = ("peer", "bits per weight", "KL", "perplexity", "processor s", "peak GiB")
    console.print(columns_table(f"peers, kept in {bench.folder / 'results'}", headings, lines))


if __name__ == "__main__":
    main()
