"""Fine-tuning: train what an artifact stores beside its codes so that its output approaches the dense model's.

    W_hat = s decode(codes) + L R,   minimise KL(p_teacher || p_student) over the scales s, norms, L and R

The codes do not change unless the stage "codes" computes new ones (`recode`). As in LoftQ (arXiv 2310.08659), new
factors start from an SVD of the encoding error. As in LQ-LoRA (arXiv 2311.12023), the low-rank term L R that the
artifact stores is what is trained, so the result is an artifact like any other. `run.finetune` is the public function;
`stages` runs the stages in order. Nothing is imported here, so that the command line can read `settings` without torch.
"""
