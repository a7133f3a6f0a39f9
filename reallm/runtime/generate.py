"""Continue a text with a model, as `reallm generate` does."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from reallm.errors import UserError
from reallm.models.limits import max_positions, vocabulary_size
from reallm.text.tokenizer_calls import decode_tokens, encode, render_user_message
from reallm.text.windows import check_vocabulary

from .open_model import RunnableModel, open_model
from .step.generate import use_step
from .step.model_reader import StepUnsupportedError

LOG = logging.getLogger(__name__)


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
        Maximum number of tokens to add. A text ends where the model's positions end, and a warning says so.
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
        For a model that cannot generate text, a prompt without tokens, with tokens that the model does not have or
        with more than it has positions, `chat` without a chat template or with one that refuses the prompt, and logits
        that are not finite.

    Examples
    --------
    >>> reallm.generate("out", "a bad", max_new_tokens=4).startswith("a bad")
    True
    """
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise UserError(
            f"--max-new-tokens {max_new_tokens} --temperature {temperature}: expected at least 1 token and a "
            "temperature of 0 or more"
        )
    opened = open_model(path, dtype, device, adapter)
    if not opened.model.can_generate():
        raise UserError(
            f"{path} is {type(opened.model).__name__}, which does not generate; expected a causal language model"
        )
    inputs = _tokens(prompt, opened, chat, path)
    limit = _limit(opened.model, inputs.shape[1], path)
    if dtype is None and not _has_step(opened.model):
        opened = open_model(path, "float32", device, adapter)
    inputs = inputs.to(opened.model.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = opened.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - inputs.shape[1]),
            do_sample=temperature > 0,
            temperature=temperature or None,
            pad_token_id=opened.tokenizer.pad_token_id or opened.tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([_check_finite]),
        )
    reached = limit is not None and output.shape[1] == limit < inputs.shape[1] + max_new_tokens
    if reached and int(output[0, -1]) not in _end_tokens(opened.model):
        LOG.warning("the text ends here because %s has only %d positions", path, limit)
    added = output[0, inputs.shape[1] :]
    return decode_tokens(opened.tokenizer, (added if chat else output[0]).tolist(), skip_special_tokens=True)


def _check_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` [1, vocabulary] as they are. Raises UserError for NaN, +infinity, or -infinity everywhere."""
    if not math.isfinite(float(scores.max())):  # the maximum is NaN if any score is
        raise UserError(
            f"the logits of token {input_ids.shape[1] + 1} hold NaN or infinity; check the weights, or generate in "
            "float32"
        )
    return scores


def _end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text."""
    settings = model.generation_config
    ends = None if settings is None else settings.eos_token_id
    return set(ends) if isinstance(ends, list) else {-1 if ends is None else int(ends)}


def _limit(model: PreTrainedModel, tokens: int, path: str | Path) -> int | None:
    """Maximum number of tokens of a text; None where nothing limits it.

    Raises UserError if a prompt of `tokens` tokens leaves no room for another.
    """
    limit = max_positions(model)
    if limit is not None and tokens >= limit:
        raise UserError(
            f"the prompt has {tokens} tokens, and {path} has only {limit} positions for it and the answer together; "
            "give a shorter prompt"
        )
    return limit


def _has_step(model: PreTrainedModel) -> bool:
    """Whether the decode step of `model` can be built; `model.generate` logs the reason if not."""
    try:
        use_step(model).ready()
    except StepUnsupportedError:
        return False
    return True


def _tokens(prompt: str, opened: RunnableModel, chat: bool, path: str | Path) -> torch.Tensor:
    """Token ids, int64 [1, tokens], of the prompt: as plain text, or as a user's message if `chat` is set."""
    text, tokenizer, where = prompt, opened.tokenizer, "the prompt"
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{path} has no chat template; leave out --chat")
        text = render_user_message(tokenizer, prompt, where, generation_prompt=True)
    ids = torch.tensor(encode(tokenizer, text, where, special_tokens=not chat), dtype=torch.int64)[None]
    if ids.shape[1] == 0:
        raise UserError(f"the prompt {prompt!r} has no tokens; give some text to continue")
    check_vocabulary(ids, tokenizer, vocabulary_size(opened.model), where)
    return ids
