"""Building the tiny random model of a case, and saving it as a released checkpoint would be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .cases import Case
from .settings import SETTINGS
from .shrink import shrink
from .sizes import VOCAB

INITIALIZER = 0.1
FLOAT32 = re.compile(r"e_score_correction_bias|A_log|(^|\.)D$|dt_bias|expert_bias")
"""Tensors that released checkpoints in bfloat16 store in float32, besides those that transformers' classes name."""


def tiny_config(case: Case) -> PretrainedConfig:
    """The configuration of a case, made small."""
    kind = CONFIG_MAPPING[case.model_type]
    tokens: dict[int, int] = {}
    values = shrink(kind().to_dict(), tokens)
    _everywhere(values, tokens)
    if case.kind == "text" and "is_decoder" in values:
        values["is_decoder"] = True
    base = SETTINGS.get(case.model_type, {}), SETTINGS.get(case.name, {})
    for changes in (*base, case.changes):
        for key, value in changes.items():
            if key != "dtype":
                _set(values, key, value)
    config: PretrainedConfig = kind.from_dict(values)
    return config


def _everywhere(values: dict[str, Any], tokens: Mapping[int, int]) -> None:
    """Set the initialiser's range, and make room for the tokens that stand for pictures, in all sub-configurations."""
    for key, value in values.items():
        if isinstance(value, dict):
            _everywhere(value, tokens)
        elif key in ("initializer_range", "init_std", "initializer_factor"):
            values[key] = 1.0 if key == "initializer_factor" else INITIALIZER
        elif key == "vocab_size" and value == VOCAB:
            values[key] = VOCAB + len(tokens)


def _set(values: dict[str, Any], key: str, value: object) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
    if value is None and last.startswith("-"):
        values.pop(last[1:], None)
    else:
        values[last] = value


def tiny_model(case: Case, seed: int = 0) -> PreTrainedModel:
    """The random model of a case, float32, in evaluation mode; norms, biases and constants are random as well."""
    config = tiny_config(case)
    kind = getattr(transformers, case.class_name)
    part = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(part, kind.config_class):
        config = part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config) if not hasattr(kind, "_from_config") else kind._from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.ndim == 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
                elif parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(INITIALIZER * torch.randn_like(parameter))
    return model.float().eval()


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the model's weights to `dtype`, except those that released checkpoints keep in float32 (see FLOAT32)."""
    kept = _kept_in_float32(type(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype == torch.float32 and not FLOAT32.search(name) and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)


def runs_in(dtype: torch.dtype, model: PreTrainedModel, folder: Path, ids: Tensor) -> bool:
    """Whether transformers' code runs on `ids` in `dtype` after it has loaded the model saved in `folder`."""
    try:
        text_forward(type(model).from_pretrained(folder, dtype=dtype).eval(), ids)
    except RuntimeError:
        return False
    except Exception:  # noqa: BLE001 - the model needs other inputs, which says nothing about dtypes
        return True
    return True


def _kept_in_float32(kind: type[PreTrainedModel]) -> set[str]:
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(kind, attribute, None) or ())
    return names


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the model as it is, with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_forward(model: PreTrainedModel, ids: Tensor, **extra: Any) -> Tensor:
    """Logits, float32, for token ids [n, seqlen] and the other inputs `extra`."""
    accepted = inspect.signature(model.forward).parameters
    keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if model.config.is_encoder_decoder:
        keywords["decoder_input_ids"] = ids
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **keywords, **extra).logits
    return logits.float()
