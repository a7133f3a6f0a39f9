"""The training itself: transformers' Trainer, with the divergence from the original model as its loss.

    loss = mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v),   p the original's, q the artifact's

taken in float32 whatever the models compute in. Adam, cosine schedule after 3% of warm-up, gradients clipped at norm 1.
The factors with the least divergence on held-out windows are kept. Windows come in an order fixed by the seed, and
nothing is dropped out, so a run that was interrupted goes on exactly as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..errors import UserError

WARM_UP_SHARE = 0.03
MAX_EVALUATION_STEPS = 50
EVALUATIONS = 5  # at least so many in a run that has as many steps


class Windows(Dataset[dict[str, Tensor]]):
    """Token ids [windows, seqlen] as the Trainer wants them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}


class Student(nn.Module):
    """The artifact's model with what is trained as the only parameters, so that a checkpoint holds nothing else."""

    def __init__(self, model: PreTrainedModel, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no child of this module
        self.trained = nn.ParameterList(parameters)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [batch, seqlen] to logits [batch, seqlen, vocabulary]."""
        logits: Tensor = self._model[0](input_ids=input_ids).logits
        return logits


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """Mean KL(original || model) over the tokens, nats, float32, from logits [..., vocabulary] of both."""
    log_q = logits.float().log_softmax(-1).flatten(0, -2)
    log_p = original.float().log_softmax(-1).flatten(0, -2)
    return kl_div(log_q, log_p, log_target=True, reduction="batchmean")


class Distillation(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains a Student against `original`, on windows in the order they are given."""

    def __init__(
        self,
        student: Student,
        original: PreTrainedModel,
        *,
        arguments: TrainingArguments,
        train: Tensor,
        held_out: Tensor,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(student, arguments, train_dataset=Windows(train), eval_dataset=Windows(held_out))
        self.original = original
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # writes dictionaries to stdout
                self.remove_callback(callback)
        for callback in callbacks:
            self.add_callback(callback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The divergence on a batch of windows; with `return_outputs` also the logits."""
        with torch.no_grad():
            original = self.original(input_ids=inputs["input_ids"]).logits
        logits = model(inputs["input_ids"])
        loss = divergence(logits, original)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The divergence on a held-out batch; logits are not kept."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """Raises UserError when the disk is full or refuses (torch then says RuntimeError, safetensors its own)."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self.args.output_dir}: a checkpoint cannot be written ({reason}); "
                "free some space and run the same command again, it goes on after the last checkpoint"
            ) from error

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class FinalEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Evaluates after the last step too, whatever the interval."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def interval(steps: int) -> int:
    """Steps between two checkpoints, each with an evaluation."""
    return min(MAX_EVALUATION_STEPS, max(1, steps // EVALUATIONS))


def training_arguments(
    folder: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's settings; checkpoints go to `folder`, of which the best and the last are kept."""
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP_SHARE * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=interval(steps),
        save_strategy="steps",
        save_steps=interval(steps),
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=interval(steps),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs must not become a DataParallel
    return arguments


def training_order(count: int, needed: int, seed: int) -> Tensor:
    """`needed` indices into `count` windows: seeded permutations one after another, int64 [needed]."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(rounds)[:needed]
