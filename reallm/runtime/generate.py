"""Continue a text with a model, as `reallm generate` does."""

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
    """Continue a prompt.

    Decoding uses reallm's decode step where possible (compiled on the CPU, a CUDA graph on a GPU), and otherwise
    transformers' decoding loop.

    Parameters
    ----------
    path
        An artifact, or any model: a folder, a .gguf file or a hub name.
    prompt
        The text to continue.
    max_new_tokens
        Maximum number of tokens to add.
    temperature
        0 always takes the most likely token; otherwise tokens are sampled.
    chat
        Send the prompt as a user's message in the model's chat template.
    device
        Where to run, such as "cpu" or "cuda:0".
    dtype
        The dtype of unpacked tensors and of transformers' decoding loop. By default the tensors keep their stored
        dtype, and the loop computes in float32.
    seed
        Seed of the sampling.
    adapter
        A LoRA or DoRA adapter for an artifact, as in `load`.

    Returns
    -------
    str
        The prompt and its continuation; with `chat` only the answer.

    Raises
    ------
    UserError
        For a model that cannot generate text, a prompt without tokens, and `chat` without a chat template.

    Examples
    --------
    >>> reallm.generate("out", "a bad", max_new_tokens=4).startswith("a bad")
    True
    """
    opened = open_model(path, dtype, device, adapter)
    if not opened.model.can_generate():
        raise UserError(
            f"{path} is {type(opened.model).__name__}, which does not generate; expected a causal language model"
        )
    if dtype is None and not _has_step(opened.model):
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


def _has_step(model: PreTrainedModel) -> bool:
    """Whether the decode step of `model` can be built; `model.generate` logs the reason if not."""
    try:
        use_step(model).ready()
    except StepUnsupportedError:
        return False
    return True


def _tokens(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool, path: str | Path) -> torch.Tensor:
    """Token ids, int64 [1, tokens], of the prompt: as plain text, or as a user's message if `chat` is set."""
    text = prompt
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{path} has no chat template; leave out --chat")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: torch.Tensor = tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"].long()
    if ids.shape[1] == 0:
        raise UserError(f"the prompt {prompt!r} has no tokens; give some text to continue")
    return ids
