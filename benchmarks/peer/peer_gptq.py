"""GPTQ (arXiv 2210.17323) with llmcompressor on every decoder linear; run in .venv-bench by peers.py.

    python peer_gptq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes the
files of peer_output.py to OUTPUT. Asymmetric, static activation order (llmcompressor's default, which stores no
permutation); ranges minimise the squared error over a search as wide as the original's, because the default, minimum
and maximum, is much worse at 2 bits.
"""

from __future__ import annotations

import sys

from llmcompressor.modifiers.gptq import GPTQModifier
from peer_oneshot import IGNORED, asymmetric, run

if __name__ == "__main__":
    groups = asymmetric(
        int(sys.argv[2]),
        int(sys.argv[3]),
        observer="memoryless_mse",
        observer_kwargs={"maxshrink": 0.8, "patience": 80},
    )
    run(GPTQModifier(ignore=IGNORED, config_groups=groups))
