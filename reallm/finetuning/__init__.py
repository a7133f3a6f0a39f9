"""Fine-tuning: train the parameters that an artifact stores beside its codes towards the model it was made from.

    W_hat = s decode(codes) + L R,   minimise KL(p_teacher || p_student) over the scales s, norms, L and R

The codes stay as they are unless the stage "codes" renews them (`recode`). As in LoftQ (arXiv 2310.08659), new factors
start from an SVD of the encoding error; as in LQ-LoRA (arXiv 2311.12023), the adapter is the stored low-rank term
itself, so the result is an artifact like any other. `run.finetune` is the public function, `stages` the order of
events. Nothing is imported here, so that the command line can read `settings` without torch.
"""
