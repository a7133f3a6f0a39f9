"""The windows that a model is calibrated on: of the text that the user named, of the model itself, or of the default.

The default is the first of these that can be had: a general corpus from the hub, text that the model writes itself, and
Python's documentation. Its windows are kept in the work folder, in `text/`, so that a resumed run has the same ones,
whether or not the hub can be reached then.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from reallm.errors import UserError
from reallm.models.loaded import LoadedModel
from reallm.system.tensor_file import save_tensors
from reallm.text.corpus import SELF, Text, general_text, load_text
from reallm.text.windows import check_seqlen, cut_windows, shortage

from .cache import content_key
from .written_windows import TEXT_FOLDER, obstacle_to_writing, written_text, written_windows

LOG = logging.getLogger(__name__)


class WindowSettings(NamedTuple):
    """Number, length and seed of the windows, as `measure` describes them."""

    nsamples: int
    seqlen: int
    seed: int
    chat_template: bool = False


def given_text(source: str | Path | None) -> Text | None:
    """The text that the user named; None for SELF and for no name, as these texts are made once the model is known.

    Raises UserError as `load_text` does.
    """
    return None if source is None or source == SELF else load_text(source)


def calibration_windows(
    loaded: LoadedModel, source: str | Path | None, text: Text | None, work: Path, settings: WindowSettings
) -> tuple[Tensor, Text]:
    """Calibration windows, int64 [n, seqlen], and the text that they are from.

    `text` is the `given_text` of `source`; `work` keeps what the model writes, and the windows of the default text.
    Raises UserError as `sample_windows` and `write_windows` do, and for SELF where the model cannot write.
    """
    if text is not None:
        return sample_windows(loaded, text, *settings), text
    check_seqlen(settings.seqlen, loaded.max_positions)
    if settings.nsamples < 1:
        raise UserError(f"--nsamples {settings.nsamples}: expected at least 1 window")
    if source is not None:
        return _own_windows(loaded, work, settings)
    name = f"default-{content_key({'model': loaded.digest, 'settings': settings})[:16]}.safetensors"
    path = work / TEXT_FOLDER / name
    if (kept := _kept_default(path)) is not None:
        LOG.info("no --text: calibrating on %s, as %s was before", kept[1].description, work)
        return kept
    ids, text = _default_windows(loaded, work, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"ids": ids}, {"description": text.description, "sha256": text.sha256})
    return ids, text


def _own_windows(loaded: LoadedModel, work: Path, settings: WindowSettings) -> tuple[Tensor, Text]:
    """Windows that the model writes, and what to call them. Raises UserError where it cannot."""
    obstacle = obstacle_to_writing(loaded)
    if settings.chat_template:
        obstacle = f"--chat-template wraps the documents of a text, and --text {SELF} has none"
    if obstacle is not None:
        raise UserError(f"--text {SELF}: {obstacle}; give a text file or a data set with --text")
    ids = written_windows(loaded, work, settings.nsamples, settings.seqlen, settings.seed)
    return ids, written_text(ids)


def _default_windows(loaded: LoadedModel, work: Path, settings: WindowSettings) -> tuple[Tensor, Text]:
    """Windows of the first default text that can be had, and this text. A warning says what is missing."""
    reasons = []
    try:
        text = general_text(settings.nsamples * settings.seqlen)
        ids = sample_windows(loaded, text, *settings)
        LOG.info("no --text: calibrating on %s", text.description)
        return ids, text
    except UserError as error:
        reasons.append(str(error))
    try:
        ids, text = _own_windows(loaded, work, settings)
        LOG.warning("no --text: calibrating on %s (%s)", text.description, "; ".join(reasons))
        return ids, text
    except UserError as error:
        reasons.append(str(error))
    text = load_text(None)
    LOG.warning("no --text: calibrating on %s, which is narrow (%s)", text.description, "; ".join(reasons))
    return sample_windows(loaded, text, *settings), text


def _kept_default(path: Path) -> tuple[Tensor, Text] | None:
    """The default windows that an earlier run kept in `path`; None if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            return file.get_tensor("ids"), Text((), notes["description"], notes["sha256"])
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        return None


def sample_windows(
    loaded: LoadedModel, text: Text, nsamples: int, seqlen: int, seed: int, chat_template: bool
) -> Tensor:
    """Sample calibration windows from `text`: token ids, int64 [n, seqlen].

    Logs a warning if `text` has fewer than `nsamples` windows. Raises UserError for a model without a tokenizer and for
    a text shorter than one window.
    """
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.source} has no tokenizer; add its tokenizer files to the folder")
    ids = cut_windows(
        text, loaded.tokenizer, nsamples, seqlen, seed, chat_template, loaded.max_positions, loaded.vocabulary
    )
    if note := shortage(ids, nsamples):
        LOG.warning("%s", note)
    return ids
