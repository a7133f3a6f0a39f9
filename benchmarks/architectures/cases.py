"""The architectures of the installed transformers that the sweep tries: one case per model type and class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from .variants import VARIANTS

KINDS = {
    "text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Kind of task -> transformers' table of model type -> class name for it."""


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One tiny model of the sweep."""

    name: str
    """The model type, followed by the kind where a type has several classes, and by "+" and the name of a variant."""
    model_type: str
    class_name: str
    kind: str
    """A key of KINDS; "image" models also read pictures."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Settings of the variant: dotted key -> value, applied last."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model is saved: bfloat16 unless the variant says otherwise."""
        return DTYPES[str(self.changes.get("dtype", "bfloat16"))]


def all_cases() -> list[Case]:
    """Every architecture of the installed transformers, then the variants of VARIANTS."""
    images = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    cases: dict[str, Case] = {}
    seen: set[tuple[str, str]] = set()
    for kind, mapping in KINDS.items():
        for model_type in sorted(mapping, key=len):  # gpt2 before gpt-sw3, which is the same model
            class_name = mapping[model_type]
            key = (CONFIG_MAPPING_NAMES.get(model_type, model_type), class_name)
            if key in seen or mapping.get(f"{model_type}_text") == class_name:  # the text part is a type of its own
                continue
            seen.add(key)
            name = f"{model_type}-{kind}" if model_type in cases else model_type
            actual = "image" if (model_type, class_name) in images else kind
            cases[name] = Case(name, model_type, class_name, actual)
    for base, variants in VARIANTS.items():
        for variant, changes in variants.items():
            case = cases[base]
            name = f"{base}+{variant}"
            cases[name] = Case(name, case.model_type, case.class_name, case.kind, changes)
    return sorted(cases.values(), key=lambda case: case.name)


def select(names: list[str]) -> list[Case]:
    """The cases whose name, model type or class matches one of the patterns `names`; all cases if it is empty."""
    cases = all_cases()
    if not names:
        return cases
    return [
        case
        for case in cases
        if any(fnmatchcase(value, name) for name in names for value in (case.name, case.model_type, case.class_name))
    ]
