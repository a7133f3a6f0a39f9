"""The entry in config.json that keeps transformers without reallm from loading an artifact with random weights.

transformers only warns about a quantisation method that it does not know, and then leaves every packed module at random
values. It does raise an error, before it opens any weights file, if `transformers_weights` in config.json does not end
like the name of a weights file, and its message ends with the entry's text. So the entry holds our advice. After
`import reallm`, reallm's quantizer removes the entry before transformers looks at it.

The configurations inside a model's configuration (such as the text part of a vision-language model) get an entry too,
because transformers can load a part of a model from the whole model's folder.
"""

from __future__ import annotations

from typing import Any

KEY = "transformers_weights"
MODEL_TEXT = "reallm packed these weights: run `pip install reallm`, and `import reallm` before loading them"
PART_TEXT = "reallm packed these weights: `import reallm`, and load the class that `architectures` in config.json names"


def add_guard(config: Any) -> None:
    """Set the entry in a transformers configuration and in the configurations inside it."""
    setattr(config, KEY, MODEL_TEXT)
    for part in inner_configs(config):
        setattr(part, KEY, PART_TEXT)


def remove_guard(config: Any) -> None:
    """Remove the entry, whatever it holds, from a transformers configuration and from those inside it.

    Without it, transformers loads the files with the usual names, which are the only ones that an artifact has.
    """
    for part in (config, *inner_configs(config)):
        if hasattr(part, KEY):
            delattr(part, KEY)


def inner_configs(config: Any) -> list[Any]:
    """The configurations inside a transformers configuration, at any depth."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [inner for part in parts if part is not None for inner in (part, *inner_configs(part))]
