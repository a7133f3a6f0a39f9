"""AWQ (arXiv 2306.00978) by llmcompressor on every decoder linear; run in .venv-bench by peers.py.

    python peer_awq.py MODEL BITS GROUP_SIZE WINDOWS OUTPUT

WINDOWS is a safetensors file with `windows`, int64 [n, seqlen]: the calibration tokens, the same as ours. Writes OUTPUT
as peer_output.py tells. Asymmetric; scales by its grid search on the first 4 windows (all would take most of an
hour), folded into the norms and rows before (no byte).
"""

from __future__ import annotations

import sys

from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer_oneshot import IGNORED, asymmetric, run

if __name__ == "__main__":
    IntermediatesCache.pin_memory = lambda *_: None  # fails where there is no GPU, and changes no number
    groups = asymmetric(int(sys.argv[2]), int(sys.argv[3]))
    run([AWQModifier(duo_scaling="both"), QuantizationModifier(ignore=IGNORED, config_groups=groups)], most_windows=4)
