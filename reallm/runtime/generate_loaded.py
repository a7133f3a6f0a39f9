"""Continue a text with a model that transformers loads."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from reallm.artifacts.directory import read_config
from reallm.artifacts.find import find_artifact
from reallm.codegen.cpu.compiler import machine_tier
from reallm.errors import UserError
from reallm.models.limits import max_positions, vocabulary_size
from reallm.text.tokenizer_calls import decode_tokens, encode, render_user_message
from reallm.text.windows import check_vocabulary

from .generate_prepared import check_finite, warn_of_end
from .open_model import RunnableModel, open_model
from .prepared import TOKENIZER_FILE, Loaded, keep_prepared
from .step.cpu import Step
from .step.generate import use_step
from .step.model_reader import FAMILIES
from .step.rotary import StepUnsupportedError

LOG = logging.getLogger(__name__)
PROMPT = "The"
"""The text that `prepare_first_text` compares tokens and logits on."""
MAX_PREPARED_BYTES = 2 << 30
"""Largest artifact that is loaded once more after it was compiled."""


def continue_text(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    dtype: str | None,
    device: str,
    seed: int,
    adapter: str | Path | None,
) -> str:
    """As `generate`, after its arguments were checked. Keeps what the next text of an artifact needs (`prepared`)."""
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
        warn_of_end(path, limit)
    if dtype is None and adapter is None and not chat:
        _keep(path, opened, prompt, inputs[0])
    added = output[0, inputs.shape[1] :]
    return decode_tokens(opened.tokenizer, (added if chat else output[0]).tolist(), skip_special_tokens=True)


def prepare_first_text(folder: Path) -> bool:
    """Build what the artifact in `folder` needs to generate on this CPU, and keep it (`prepared`), for its first text.

    Returns whether it was kept: not for an artifact that has no decode step or no tokenizer, that cannot be loaded
    here, or whose weights files exceed MAX_PREPARED_BYTES, because the whole model is loaded.
    """
    architectures = read_config(folder).get("architectures") or [""]
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    if architectures[0] not in FAMILIES or nbytes > MAX_PREPARED_BYTES or not has_tokenizer or machine_tier() == "off":
        return False
    try:
        opened = open_model(folder, None)
    except UserError as error:
        LOG.warning("%s is written, but cannot be loaded here: %s", folder, error)
        return False
    if not _has_step(opened.model):
        return False
    return _keep(folder, opened, PROMPT, _tokens(PROMPT, opened, False, folder)[0])


def _keep(path: str | Path, opened: RunnableModel, prompt: str, tokens: torch.Tensor) -> bool:
    """Keep what the next text needs, if the model is an artifact with a decode step on the CPU."""
    folder = find_artifact(path)
    step = use_step(opened.model).step
    if folder is None or not isinstance(step, Step):
        return False
    model = opened.model
    ends, vocabulary = frozenset(_end_tokens(model)), vocabulary_size(model)
    return keep_prepared(
        Loaded(folder, model, opened.tokenizer, step, prompt, tokens, ends, max_positions(model), vocabulary)
    )


def _check_finite(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` [1, vocabulary] as they are. Raises UserError as `check_finite` does."""
    check_finite(scores, input_ids.shape[1])
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
