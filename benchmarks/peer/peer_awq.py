"""AWQ (arXiv 2306.00978) with llmcompressor on every decoder linear; run in .venv-bench by peers.py.

    python peer_awq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes the
files of peer_output.py to OUTPUT. Asymmetric; the scales come from its grid search on the first 4 windows (all would
take most of an hour) and are folded into the norms and rows before, which takes no bytes.
"""

from __future__ import annotations

import sys

from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_oneshot import IGNORED, asymmetric, run

if __name__ == "__main__":
    IntermediatesCache.pin_memory = lambda *_: None  # fails without a GPU and does not affect the result
    groups = asymmetric(int(sys.argv[2]), int(sys.argv[3]))
    run([AWQModifier(duo_scaling="both"), QuantizationModifier(ignore=IGNORED, config_groups=groups)], max_windows=4)
