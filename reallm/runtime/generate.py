"""`reallm generate`: continue a text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reallm.errors import UserError

from .open_model import open_model
from .step.generate import use_step
from .step.model_reader import StepUnsupportedError


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    chat: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    adapter: str | Path | None = None,
) -> str:
    """`prompt` and what the model at `path` adds, at most `max_new_tokens` tokens; with `chat` only the answer.

    `temperature` 0 takes the likeliest token each time; above it, tokens are drawn with `seed`. The decode step,
    compiled for the CPU or recorded on a GPU, does the work where it can. `dtype` is what transformers' loop
    computes in otherwise, and what is not packed is kept in (default: float32 for the one, as stored for the
    other). `adapter` is a LoRA or DoRA adapter to an artifact, as for `load`. Raises UserError for a model that
    does not generate, a prompt without tokens and a chat without a template.
    """
    opened = open_model(path, dtype, device, adapter)
    if not opened.model.can_generate():
        raise UserError(f"{path} is {type(opened.model).__name__}, which does not generate; expected a causal model")
    if dtype is None and not _stepping(opened.model):
        opened = open_model(path, "float32", device, adapter)
    inputs = _tokens(prompt, opened.tokenizer, chat, path).to(opened.model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = opened.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            pad_token_id=opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id,
        )
    added = output[0, inputs.shape[1] :]
    answer: str = opened.tokenizer.decode(added if chat else output[0], skip_special_tokens=True)
    return answer


def _stepping(model: PreTrainedModel) -> bool:
    """Whether `model.generate` now uses the compiled step."""
    try:
        use_step(model).ready()
    except StepUnsupportedError:
        return False  # generate will say why
    return True


def _tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool, path: str | Path) -> torch.Tensor:
    """Int64 [1, tokens] of the prompt, as plain text or as a user's message."""
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{path} has no chat template; leave --chat out")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"].long()
    if ids.shape[1] == 0:
        raise UserError(f"the prompt {prompt!r} has no tokens; give some text to go on from")
    return ids
