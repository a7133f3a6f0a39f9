"""Fine-tuning: what an artifact has beside its codes is trained against the model it was made from.

    W_hat = s decode(codes) + L R,   minimise KL(p_original || p_artifact) over scales s, norms, L and R

The codes stay as they are, unless new ones are made first (`recoding`). As in LoftQ (arXiv 2310.08659), new factors
start from an SVD of what the codes miss; as in LQ-LoRA (arXiv 2311.12023), the adapter is the stored term itself, so
the result is an artifact like any other. `stage` is the order of events.
"""

from .run import finetune

__all__ = ["finetune"]
