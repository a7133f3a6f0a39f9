"""`model.generate` with reallm's decode step, for a single text with sampling or greedy decoding.

The step is compiled on the CPU and recorded as a CUDA graph on a GPU. transformers still prepares everything (settings,
logits processors, stopping criteria); only its decoding loop is replaced by one that gets the logits from the step.
For calls that the step does not support, transformers' own loop is used, and the log says why, once for each reason.
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
from .rotary import StepUnsupportedError

LOG = logging.getLogger(__name__)
_OWN_LOOPS = ("custom_generate", "assistant_model", "tokenizer", "negative_prompt_ids", "synced_gpus")
"""Arguments of `generate` that need transformers' decoding loop, or more than one model."""
_EXPECTED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}
"""Arguments that transformers passes to the decoding loop of a model whose only input is text."""
_EXTRA_OUTPUTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
"""Settings that request other outputs than the text."""


class StepGenerate:
    """The function that replaces `model.generate`; it builds the step when it is first called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.step: Step | RecordedStep | None = None
        self.logged: set[str] = set()
        self.lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGenerate, (self.model,)  # a copied or unpickled model builds its own step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does, with the same arguments and result."""
        generate = type(self.model).generate
        streamer = kwargs.get("streamer")
        if not _has_stop_strings(self.model, kwargs):
            kwargs.pop("tokenizer", None)  # which has no other use; `transformers serve` always gives it
        argument = next((name for name in _OWN_LOOPS if kwargs.get(name) is not None), None)
        if argument is not None:
            self.log_once(f"the step does not support generate({argument}=...)")
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
            reason = _unsupported(input_ids, self.model.device, generation_config, mode, model_kwargs)
            if reason is None and self.lock.acquire(blocking=False):
                try:
                    step = self.ready()
                    step.reserve(max(_limit(stopping_criteria, generation_config), input_ids.shape[1] + 1))
                    with one_thread():  # torch does little between two tokens, and its idle threads would spin
                        return _decode(
                            step, input_ids, logits_processor, stopping_criteria, generation_config, streamer
                        )
                except StepUnsupportedError as error:
                    reason = str(error)
                finally:
                    self.lock.release()
            self.log_once(reason or "another thread is generating")
            loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
            options = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            if streamer is not None:
                options["streamer"] = streamer
            return loop(model, input_ids, generation_config=generation_config, **options, **model_kwargs)

        return generate(self.model, *args, custom_generate=decode, **kwargs)

    def ready(self) -> Step | RecordedStep:
        """The step, built again if the model has changed. Raises StepUnsupportedError."""
        if self.step is None or self.step.outdated():
            self.step = None
            self.step = record_step(self.model) if self.model.device.type == "cuda" else compile_step(self.model)
        self.step.refresh()
        return self.step

    def log_once(self, reason: str) -> None:
        """Log that transformers' loop is used, and why; a reason that was logged before is left out."""
        if reason not in self.logged:
            self.logged.add(reason)
            LOG.warning("using transformers' decoding loop, which is slower than the reallm decode step: %s", reason)


def use_step(model: PreTrainedModel) -> StepGenerate:
    """Replace `model.generate` by one that uses the decode step where it can, and return it."""
    generate = vars(model).get("generate")
    if not isinstance(generate, StepGenerate):
        model.generate = generate = StepGenerate(model)
    return generate


def _has_stop_strings(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `generate` ends at strings, which the tokenizer has to find."""
    configs = (model.generation_config, kwargs.get("generation_config"))
    return bool(kwargs.get("stop_strings")) or any(getattr(config, "stop_strings", None) for config in configs)


def _unsupported(
    input_ids: Tensor,
    device: torch.device,
    config: GenerationConfig,
    mode: GenerationMode,
    model_kwargs: Mapping[str, Any],
) -> str | None:
    """Why the step does not support this call; None if it does."""
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    requested = next((name for name in _EXTRA_OUTPUTS if getattr(config, name, None)), None)
    unexpected = {name for name, value in model_kwargs.items() if value is not None} - _EXPECTED
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the generation mode is {mode.value}"
    if input_ids.shape[0] != 1:
        return f"the step supports batch size 1, the batch size is {input_ids.shape[0]}"
    if input_ids.shape[1] == 0 or input_ids.device != device:
        return "the prompt is empty" if input_ids.shape[1] == 0 else f"the prompt is on {input_ids.device}"
    if requested or not model_kwargs.get("use_cache", True):
        return f"{requested} is set" if requested else "use_cache is off"
    if unexpected:
        return f"the model is given the argument {min(unexpected)}"
    if mask is not None and not bool(mask.all()):
        return "part of the prompt is masked"
    if cache is not None and cache.get_seq_length():
        return "past_key_values holds an earlier text"
    return None


def _limit(stopping_criteria: StoppingCriteriaList, config: GenerationConfig) -> int:
    """The maximum number of tokens of the text."""
    return stopping_criteria.max_length or config.max_length or 0


def _most_likely(scores: Tensor) -> Tensor:
    """The index of the largest score of each row; on a CPU by numpy, which takes a tenth of torch's time."""
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
    """Continue the text [1, tokens] until a criterion stops it; `step` has reserved enough positions."""
    logits = step.run(input_ids[0])
    while True:
        scores = logits_processor(input_ids, logits[None])
        if generation_config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            chosen = _most_likely(scores)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        if bool(stopping_criteria(input_ids, None).all()):
            break
        logits = step.run(chosen)
    if streamer is not None:
        streamer.end()
    return input_ids
