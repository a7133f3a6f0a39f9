"""`model.generate` through the decode step, for one text drawn or taken greedily; all else as before.

On the CPU the step is compiled, on a GPU recorded.

transformers prepares everything (settings, processors of logits, criteria to stop) and is handed another decoding loop,
which asks the step for logits and nothing else. Whatever the step cannot do goes through transformers' own loop, and a
log line says why, once for each reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from reallm.system.threads import one_thread

from .cpu import Step, compile_step
from .cuda_graph import RecordedStep, record_step
from .model_reader import StepUnsupportedError

LOG = logging.getLogger(__name__)
_OWN_LOOPS = ("custom_generate", "assistant_model", "tokenizer", "negative_prompt_ids", "synced_gpus")
"""Arguments of `generate` that bring another decoding loop, or more than one model."""
_EXPECTED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
"""What transformers hands to a decoding loop for a text alone."""


class StepGenerate:
    """Stands in the place of `model.generate`; compiles the step at its first use."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.step: Step | RecordedStep | None = None
        self.bound: object = None
        self.said: set[str] = set()
        self.lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGenerate, (self.model,)  # a copy or an unpickled model compiles its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`."""
        generate = type(self.model).generate
        streamer = kwargs.get("streamer")
        other = next((name for name in _OWN_LOOPS if kwargs.get(name) is not None), None)
        if other is not None:
            self.say(f"generate was given {other}")
            return generate(self.model, *args, **kwargs)

        def decode(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            step = None
            mode = generation_config.get_generation_mode()
            reason = _unsuited(input_ids, self.model.device, generation_config, mode, model_kwargs)
            if reason is None and self.lock.acquire(blocking=False):
                try:
                    step = self.ready()
                    step.reserve(max(_limit(stopping_criteria, generation_config), input_ids.shape[1] + 1))
                    with one_thread():  # what torch does between two tokens is little, and its threads would spin on
                        return _decode(
                            step, input_ids, logits_processor, stopping_criteria, generation_config, streamer
                        )
                except StepUnsupportedError as error:
                    reason = str(error)
                finally:
                    self.lock.release()
            self.say(reason or "another thread is generating")
            loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
            given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            if streamer is not None:
                given["streamer"] = streamer
            return loop(model, input_ids, generation_config=generation_config, **given, **model_kwargs)

        return generate(self.model, *args, custom_generate=decode, **kwargs)

    def ready(self) -> Step | RecordedStep:
        """The step, compiled or recorded anew if the model has changed. Raises StepUnsupportedError."""
        if self.step is None or self.step.outdated():
            self.step = None
            self.step = record_step(self.model) if self.model.device.type == "cuda" else compile_step(self.model)
        self.step.refresh()
        return self.step

    def say(self, reason: str) -> None:
        """Log once that transformers' loop is taken, and why."""
        if reason not in self.said:
            self.said.add(reason)
            LOG.warning("generating without the decode step of its own: %s", reason)


def use_step(model: PreTrainedModel) -> StepGenerate:
    """Let `model.generate` use the compiled decode step where it can; what stands in its place from now on."""
    found = vars(model).get("generate")
    if not isinstance(found, StepGenerate):
        model.generate = found = StepGenerate(model)
    return found


def _unsuited(
    input_ids: Tensor,
    device: torch.device,
    config: GenerationConfig,
    mode: GenerationMode,
    model_kwargs: Mapping[str, Any],
) -> str | None:
    """Why the step cannot do what was asked for; None if it can."""
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    wanted = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = next((name for name in wanted if getattr(config, name, None)), None)
    unexpected = {name for name, value in model_kwargs.items() if value is not None} - _EXPECTED
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode is {mode.value}"
    if input_ids.shape[0] != 1:
        return f"{input_ids.shape[0]} texts at once"
    if input_ids.shape[1] == 0 or input_ids.device != device:
        return "the prompt is empty" if input_ids.shape[1] == 0 else f"the prompt is on {input_ids.device}"
    if asked or not model_kwargs.get("use_cache", True):
        return f"{asked} was asked for" if asked else "use_cache is off"
    if unexpected:
        return f"the model is given {min(unexpected)}"
    if mask is not None and not bool(mask.all()):
        return "part of the prompt is masked"
    if cache is not None and cache.get_seq_length():
        return "there is a cache of an earlier text"
    return None


def _limit(stopping_criteria: StoppingCriteriaList, config: GenerationConfig) -> int:
    """Tokens of the longest text there may be."""
    return stopping_criteria.max_length or config.max_length or 0


def _likeliest(scores: Tensor) -> Tensor:
    """The index of the largest of each row; on a CPU by numpy, in a tenth of the time."""
    return scores.argmax(-1) if scores.is_cuda else torch.from_numpy(scores.numpy().argmax(-1))


@torch.no_grad()
def _decode(
    step: Step | RecordedStep,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
) -> Tensor:
    """The text [1, tokens] continued until a criterion stops it; `step` has room for it."""
    logits = step.run(input_ids[0])
    while True:
        scores = logits_processor(input_ids, logits[None])
        if generation_config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            chosen = _likeliest(scores)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if bool(stopping_criteria(input_ids, None).all()):
            break
        logits = step.run(chosen)
    if streamer is not None:
        streamer.end()
    return input_ids
