"""The files of a processor: what a model that takes images or sound needs beside its tokenizer."""

from __future__ import annotations

from pathlib import Path

_CONFIGS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_CHAT_TEMPLATES = ("chat_template.json", "chat_template.jinja")


def processor_files(folder: Path) -> tuple[Path, ...]:
    """The files in `folder` that AutoProcessor reads beside the tokenizer's; none for a model of text alone.

    A processor has its own chat template, which places the images; it is among the files.
    """
    configs = tuple(folder / name for name in _CONFIGS if (folder / name).is_file())
    if not configs:
        return ()
    return configs + tuple(folder / name for name in _CHAT_TEMPLATES if (folder / name).is_file())
