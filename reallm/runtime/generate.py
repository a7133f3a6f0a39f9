"""Continue a text with a model, as `reallm generate` does."""

from __future__ import annotations

import math
from pathlib import Path

from reallm.errors import UserError


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
    transformers' decoding loop. The second plain greedy text of an artifact on the CPU does not import transformers.

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
    if not chat and temperature == 0 and dtype is None and device == "cpu" and adapter is None:
        from .generate_prepared import continue_prepared  # torch is needed from here on

        text = continue_prepared(path, prompt, max_new_tokens)
        if text is not None:
            return text
    from .generate_loaded import continue_text  # transformers is needed from here on

    return continue_text(
        path,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        dtype=dtype,
        device=device,
        seed=seed,
        adapter=adapter,
    )
