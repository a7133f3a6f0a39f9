"""What `generate` keeps of an artifact, so that the next text needs no transformers, whose import takes 3 seconds.

transformers decides how a model computes, which tokens end a text and how a text becomes tokens. After it has loaded an
artifact, these decisions are kept in the cache folder: the program of the decode step, the rotary frequencies, the
last tokens, and that the tokenizer is the one of tokenizer.json. Weights are not kept; they are read from the artifact,
which is verified as always.

Nothing is kept unless a step made from these facts gives the same logits, bit for bit, and the tokenizer the same
tokens. A file's name is a hash of the artifact's manifest, of the packages' versions, of the sources of this package
that make steps, and of the machine's instruction set, so a changed file or package makes a new one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from reallm.artifacts.manifest import artifact_digest
from reallm.codegen.cpu.compiler import SOURCES, machine_tier
from reallm.codegen.decode_step.program import StepProgram
from reallm.kernels.storage.cache_folder import cache_folder
from reallm.planner.tables.records import Record, RecordError, read_record, write_record
from reallm.system.torch_dtypes import torch_name

from .step.cpu import Step, bind_step
from .step.rotary import StepUnsupportedError, rotary_table
from .step.skeleton import Angles, Rotary, Skeleton, read_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
TOKENIZER_FILE = "tokenizer.json"
MAX_KEPT = 64
"""Maximum number of artifacts whose facts are kept; a file has about 50 kB."""
CHECKED_POSITIONS = 4096
"""Number of positions at which the kept rotary table is compared with the model's own."""
_PACKAGES = ("reallm", "torch", "transformers", "tokenizers")
_CODE = Path(__file__).resolve().parents[1]
_FOLDERS = (_CODE / "runtime", _CODE / "codegen" / "decode_step", _CODE / "codegen" / "cpu", SOURCES)
"""Folders of the sources that decide what a step computes."""
_GREEDY_SETTINGS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("transformers_version", "_from_model_config"),
    }
)
"""Settings of generation that are arguments here, or that greedy decoding ignores."""


class PreparedModel(Record):
    """The facts about one artifact that its decode step needs."""

    program: StepProgram
    angles: Mapping[str, Angles]
    """Name of each rotary table -> its frequencies and factor."""
    dtype: str
    """The dtype of decoded weights, such as "bfloat16"."""
    ends: tuple[int, ...]
    """The tokens that end a text."""
    positions: int | None
    """Maximum number of tokens of a text; None where nothing limits it."""
    vocabulary: int

    def step(self, folder: Path) -> Step:
        """The decode step of the artifact in `folder`. Raises StepUnsupportedError, UserError and KeyError."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return bind_step(read_skeleton(folder, self.program, self.angles, dtype), self.program)


@dataclass(frozen=True)
class Loaded:
    """An artifact as transformers loaded it, and a text that it has continued."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    step: Step
    prompt: str
    tokens: Tensor
    """The prompt's tokens, int64 [tokens]."""
    ends: frozenset[int]
    positions: int | None
    vocabulary: int | None


def prepared_model(folder: Path) -> PreparedModel | None:
    """What was kept of the artifact in `folder`; None if nothing was."""
    path = _place(folder)
    if path is None or not path.is_file():
        return None
    try:
        return read_record(path, PreparedModel, "generate")
    except RecordError as error:
        LOG.debug("%s", error)
        return None


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in the artifact's tokenizer.json."""
    return Tokenizer.from_file(str(folder / TOKENIZER_FILE))


def keep_prepared(loaded: Loaded) -> bool:
    """Keep what the next text needs. Returns whether it was kept: not for an artifact that needs transformers."""
    place, angles = _place(loaded.folder), _angles(loaded)
    if place is None or angles is None or loaded.vocabulary is None:
        return False
    if _other_settings(loaded.model) or not _same_tokenizer(loaded):
        return False
    prepared = PreparedModel(
        program=loaded.step.program,
        angles=angles,
        dtype=torch_name(loaded.model.dtype),
        ends=tuple(sorted(loaded.ends)),
        positions=loaded.positions,
        vocabulary=loaded.vocabulary,
    )
    try:
        if not _same_logits(loaded, prepared):
            return False
        write_record(place, prepared)
        _remove_oldest(place.parent)
    except (StepUnsupportedError, KeyError, OSError) as error:
        LOG.debug("%s is not prepared: %r", loaded.folder, error)
        return False
    return True


def _remove_oldest(folder: Path) -> None:
    """Remove the oldest files of `folder` beyond MAX_KEPT."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[:-MAX_KEPT]:
        path.unlink(missing_ok=True)


def _place(folder: Path) -> Path | None:
    """The file for the artifact in `folder`; None for one without a manifest."""
    digest = artifact_digest(folder)
    if digest is None:
        return None
    parts = (digest, machine_tier(), *(f"{name} {version(name)}" for name in _PACKAGES), _sources_digest())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / "prepared" / f"{key[:32]}.json"


@cache
def _sources_digest() -> str:
    """sha256 of the sources that decide what a step computes."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".hpp", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _other_settings(model: PreTrainedModel) -> set[str]:
    """Settings of the model's generation that are neither off nor among _GREEDY_SETTINGS."""
    settings: dict[str, Any] = model.generation_config.to_diff_dict()
    if settings.get("use_cache", True) is False:
        return {"use_cache"}
    return {name for name, value in settings.items() if value not in (None, False)} - _GREEDY_SETTINGS


def _angles(loaded: Loaded) -> dict[str, Angles] | None:
    """The frequencies of the model's rotary tables; None if its tables are not those of its frequencies."""
    module: Any = loaded.model.get_submodule("model.rotary_emb")
    angles: dict[str, Angles] = {}
    for name in loaded.step.program.tables:
        prefix = f"{kind}_" if (kind := name.partition(".")[2]) else ""
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        if not isinstance(frequencies, Tensor) or frequencies.dtype != torch.float32:
            return None
        angles[name] = (tuple(frequencies.tolist()), float(getattr(module, f"{prefix}attention_scaling", 1.0)))
    skeleton, count = Skeleton(), min(loaded.positions or CHECKED_POSITIONS, CHECKED_POSITIONS)
    skeleton.put("model.rotary_emb", Rotary(angles))
    for name in angles:
        pairs = zip(rotary_table(loaded.model, name, count), rotary_table(skeleton, name, count), strict=True)
        if not all(torch.equal(own, kept) for own, kept in pairs):
            return None
    return angles


def _same_tokenizer(loaded: Loaded) -> bool:
    """Whether tokenizer.json alone is the model's tokenizer."""
    tokenizer: Any = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not (loaded.folder / TOKENIZER_FILE).is_file() or not isinstance(backend, Tokenizer):
        return False
    own = read_tokenizer(loaded.folder)
    if backend.to_str() != own.to_str() or backend.encode_special_tokens != own.encode_special_tokens:
        return False
    if tokenizer.clean_up_tokenization_spaces or not _calls_backend(tokenizer):
        return False
    return bool(own.encode(loaded.prompt).ids == loaded.tokens.tolist())


def _calls_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's class encodes and decodes as transformers' general class does."""
    from transformers import PreTrainedTokenizerFast as General  # loaded already: a tokenizer is at hand

    names = ("__call__", "_encode_plus", "decode", "_decode")
    return all(getattr(type(tokenizer), name) is getattr(General, name) for name in names)


def _same_logits(loaded: Loaded, prepared: PreparedModel) -> bool:
    """Whether the kept step gives the same logits as the model's own after the prompt."""
    steps = (loaded.step, prepared.step(loaded.folder))
    for step in steps:
        step.reserve(loaded.tokens.numel())
    own, kept = (step.run(loaded.tokens) for step in steps)
    return torch.equal(own, kept)
