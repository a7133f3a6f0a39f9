"""How a folder says that its weights are quantised, and the schemes that reallm can unpack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reallm.errors import UserError

from .bitsandbytes import bitsandbytes_schemes
from .compressed_tensors import compressed_tensors_schemes
from .fp8 import fp8_schemes
from .gptq import awq_schemes, gptq_schemes
from .mxfp4 import mxfp4_schemes
from .scheme import Scheme

KEYS = ("quantization_config", "compression_config")
"""The keys of config.json that describe quantised weights; the second is that of compressed-tensors before 2024."""
OTHER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
"""Files of other tools that describe quantised weights: ModelOpt, AutoGPTQ and AutoAWQ."""
METHODS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Scheme, ...]]] = {
    "fp8": fp8_schemes,
    "mxfp8": fp8_schemes,
    "fbgemm_fp8": fp8_schemes,
    "mxfp4": lambda settings: mxfp4_schemes(),
    "gptq": gptq_schemes,
    "awq": awq_schemes,
    "compressed-tensors": compressed_tensors_schemes,
    "bitsandbytes": lambda settings: bitsandbytes_schemes(),
}
"""The methods that can be unpacked."""


def find_schemes(config: Mapping[str, Any], folder: Path, label: str) -> tuple[Scheme, ...]:
    """How the weights in `folder` are quantised, by its config.json; () for a model of plain floats.

    Raises UserError, naming the model as `label`, for a method or a setting that cannot be unpacked, and for a file of
    another tool that says so where config.json does not.
    """
    found = list(_settings(config))
    if not found:
        for name in OTHER_FILES:
            if (folder / name).is_file():
                raise UserError(
                    f"{label} holds {name}, so its weights are quantised, but config.json does not say how; "
                    "give the original, unquantised model"
                )
        return ()
    settings = found[0]
    if len(found) > 1 and any(other != settings for other in found):
        raise UserError(f"{label}: config.json describes two quantisations; give the original, unquantised model")
    return _schemes(settings, label)


def _schemes(settings: object, label: str) -> tuple[Scheme, ...]:
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method is None and isinstance(settings, Mapping) and (settings.keys() & {"load_in_4bit", "load_in_8bit"}):
        method = "bitsandbytes"
    if method is None and isinstance(settings, Mapping) and "config_groups" in settings:
        method = "compressed-tensors"
    if method == "reallm":
        raise UserError(f"{label} was already compressed by reallm; give the model it was made from")
    if not isinstance(settings, Mapping) or not isinstance(method, str) or method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UserError(
            f"{label} is already quantised ({method}), and only {known} can be unpacked; "
            "give the original, unquantised model"
        )
    try:
        return METHODS[method](settings)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(
            f"{label} is quantised by {method}, but not in a way that can be unpacked ({error}); "
            "give the original, unquantised model"
        ) from error


def _settings(config: Mapping[str, Any]) -> Iterator[object]:
    """What the keys `KEYS` hold in `config` and in the configurations of its parts."""
    for key, value in config.items():
        if key in KEYS and value is not None:
            yield value
        elif isinstance(value, Mapping):
            yield from _settings(value)
