"""Which class of transformers a folder is loaded as: exactly the one that its config.json names."""

from __future__ import annotations

import inspect

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from reallm.errors import UserError

# Model type -> class name. Classes that take images or sound come first: a model type may be in several tables, and
# only these classes hold all tensors of such a model.
_TABLES: tuple[dict[str, str], ...] = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,  # has decoders that listen (Audio Flamingo); others are refused below
)
_LANGUAGE_MODELS = frozenset(name for table in _TABLES for name in table.values())


def model_class(
    config: PretrainedConfig, label: str, encoder: str | None = None
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class that `config` names, or else the one of its model type; and the configuration to build it with.

    That is `config`, or its part for text where the class is the text model of a larger one. `encoder` is the class
    instead where the model is used for its hidden states (`sentence_encoder.encoder_class`). Raises UserError, naming
    the model as `label` and giving the reason, for a class that transformers does not have, that is not a language
    model, or that cannot run on token ids alone.
    """
    name = encoder or _class_name(config, label)
    kind = _transformers_class(name)
    if name not in (encoder, *_LANGUAGE_MODELS) or kind is None:
        raise UserError(f"{label} has the unsupported architecture {name}: {_why_unsupported(name)}")
    if problem := _why_not_token_ids(kind):
        raise UserError(f"{label} has the unsupported architecture {name}: {problem}")
    for candidate in (config, config.get_text_config()):
        if kind.config_class is None or isinstance(candidate, kind.config_class):
            return kind, candidate
    if any(table.get(config.model_type) == name for table in _TABLES):
        return kind, config  # transformers builds this class from the configuration of a model with another name
    if any(table.get(config.model_type) == name for table in _TABLES):  # such as Llama's class for InternLM 3
        return kind, config
    raise UserError(
        f"{label}: config.json names the architecture {name} beside model_type {config.model_type!r}, which belongs to "
        "another architecture; get the original config.json"
    )


def _class_name(config: PretrainedConfig, label: str) -> str:
    """The first language model among the named architectures; without any, the class of the model type."""
    named = config.architectures
    if named is None or named == []:
        return next((table[config.model_type] for table in _TABLES if config.model_type in table), config.model_type)
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{label}: config.json has architectures = {named!r}; expected a list of class names")
    return next((name for name in named if name in _LANGUAGE_MODELS), ", ".join(named))


def _why_unsupported(name: str) -> str:
    """The reason why the class `name` is not a language model of transformers, with what was expected."""
    kind = _transformers_class(name)
    if kind is None:
        return f"transformers {transformers.__version__} has no such class, and custom code is never run; {_EXPECTED}"
    if "decoder_input_ids" in inspect.signature(kind.forward).parameters:
        return f"{_ENCODER_DECODER}; {_EXPECTED}"
    if name.endswith("Model"):
        return f"it has no output layer for tokens; {_EXPECTED}"
    return f"it does not predict tokens of text; {_EXPECTED}"


def _transformers_class(name: str) -> type[PreTrainedModel] | None:
    """The model class of transformers of that name; None if there is none."""
    kind: object = getattr(transformers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _why_not_token_ids(kind: type[PreTrainedModel]) -> str:
    """The reason why a language model cannot run on token ids alone; empty where it can."""
    parameters = dict(list(inspect.signature(kind.forward).parameters.items())[1:])
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_POSITIONAL
        and parameter.kind is not parameter.VAR_KEYWORD
        and name != "input_ids"
    ]
    if "input_ids" in parameters and needed:
        return f"it cannot run on token ids alone, it also needs {needed[0]}; {_EXPECTED}"
    if "decoder_input_ids" in parameters:
        return f"{_ENCODER_DECODER}; {_EXPECTED}"
    return "" if "input_ids" in parameters else f"it takes no token ids (input_ids); {_EXPECTED}"


_ENCODER_DECODER = "it is an encoder-decoder model, whose decoder needs a second input"
_EXPECTED = "expected a causal or masked language model, or one that takes images or sound beside text"
