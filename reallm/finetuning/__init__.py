"""Fine-tuning: the low-rank factors of an artifact are trained against the model it was made from.

    W_hat = decode(codes) + L R,   minimise KL(p_original || p_artifact) over L and R; the codes stay as they are

As in LoftQ (arXiv 2310.08659), new factors start from an SVD of what the codes miss; as in LQ-LoRA (arXiv 2311.12023),
the adapter is the stored term itself, so the result is an artifact like any other. `stage` is the order of events.
"""

from .stage import finetune

__all__ = ["finetune"]
