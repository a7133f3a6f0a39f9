"""Logits of a recorded decode step and of transformers, under Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny import VOCAB, tiny_model

PROMPT, DECODED = 21, 4
Logits = tuple[torch.Tensor, torch.Tensor]


def logits(
    architecture: str, settings: Mapping[str, object], device: str = "cpu", dtype: str = "float32", share: int = 256
) -> Logits:
    """(logits of the step, of transformers in float32), each [1 + DECODED, vocabulary].

    The rows follow a prompt, which is read in two parts, and each decoded token.
    """
    from reallm.runtime.step import cuda_graph as replay

    replay.PROMPT_TOKENS, replay.SHARE = 12, share
    model = tiny_model(architecture, dtype=getattr(torch, dtype), settings=settings).to(device)
    tokens = torch.randint(0, VOCAB, (PROMPT + DECODED,), generator=torch.Generator().manual_seed(0)).to(device)
    step = replay.record_step(model)
    step.reserve(len(tokens))
    rows = [step.run(tokens[:PROMPT]).clone()]
    rows += [step.run(tokens[index : index + 1]).clone() for index in range(PROMPT, len(tokens))]
    model.set_attn_implementation("eager")  # transformers 5.17 ignores Gemma 2's cap of the scores with sdpa
    with torch.no_grad():
        expected = model.float()(tokens[None]).logits[0, PROMPT - 1 :].float()
    return torch.stack(rows).cpu(), expected.cpu()


def packed_logits(folder: str, device: str = "cpu") -> Logits:
    """As `logits`, for the artifact at `folder` with float32 activations, after two tokens and each of two more."""
    import reallm
    from reallm.runtime.step import cuda_graph as replay

    model, _ = reallm.load(folder, dtype="float32", device=device)
    tokens = torch.arange(5, 9).to(device)
    step = replay.record_step(model)
    step.reserve(len(tokens))
    rows = [step.run(tokens[:2]).clone(), *(step.run(tokens[i : i + 1]).clone() for i in (2, 3))]
    with torch.enable_grad():  # makes the model use the decoded weights
        expected = model(tokens[None]).logits[0, 1:].float().detach()
    return torch.stack(rows).cpu(), expected.cpu()
