"""The training itself: transformers' Trainer, with the divergence from the original model as its loss.

    loss = mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v),   p the original's, q the artifact's

taken in float32 whatever the models compute in, without their logits in memory where a head is no more than a matrix
(`objective`). AdamW with a learning rate for each group of parameters, cosine schedule after 3% of warm-up, gradients
clipped at norm 1. The state with the least divergence on held-out windows is kept; a loss that is not finite ends the
run. Windows come in an order fixed by the seed, and nothing is dropped out, so a run that was interrupted goes on
exactly as it would have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from reallm.errors import UserError

from .chat_windows import SampledWindows
from .checkpoints import read_end
from .embedding_maps import EmbeddingMaps
from .objective import Objective
from .processes import everywhere

LOG = logging.getLogger(__name__)
BETAS = (0.9, 0.95)
"""Of AdamW; the second is lower than usual because runs are short."""
WARM_UP_SHARE = 0.03
MAX_EVALUATION_STEPS = 50
EVALUATIONS = 5  # at least so many in a run that has as many steps


class NotFiniteError(ArithmeticError):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of a Sample as the Trainer wants them; equal ones may stand in it more than once."""

    def __init__(self, sample: SampledWindows) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return len(self.sample.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.sample
        row = {"input_ids": sample.tokens[index], "names": sample.names[index]}
        return row if sample.scored is None else row | {"scored": sample.scored[index]}


class Student(nn.Module):
    """The loss with what is trained as the only parameters, so that a checkpoint holds nothing else."""

    def __init__(self, objective: Objective, groups: Mapping[str, Sequence[nn.Parameter]], maps: EmbeddingMaps) -> None:
        super().__init__()
        self.objective, self.maps = objective, maps
        self.groups = {name: list(group) for name, group in groups.items() if group}
        self.trained = nn.ParameterList([parameter for group in self.groups.values() for parameter in group])

    def forward(self, input_ids: Tensor, names: Tensor, scored: Tensor | None = None) -> Tensor:
        """The mean loss of a batch of windows, as `Windows` gives them."""
        return self.objective(input_ids, names.tolist(), scored, self.maps)


class Distillation(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trains a Student on windows in the order they are given."""

    def __init__(
        self,
        student: Student,
        *,
        arguments: TrainingArguments,
        rates: Mapping[str, float],
        train: SampledWindows,
        held_out: SampledWindows,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(student, arguments, train_dataset=Windows(train), eval_dataset=Windows(held_out))
        self.student, self.rates = student, rates
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # writes dictionaries to stdout
                self.remove_callback(callback)
        for callback in callbacks:
            self.add_callback(callback)

    def go_on(self, folder: Path, checkpoint: Path | None) -> None:
        """Train on after `checkpoint` (None: from the start); if training in `folder` was over, only take its result.

        Raises NotFiniteError.
        """
        end = read_end(folder)
        if end is None:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        LOG.info("training was over after step %d; its best state, %s, is taken", end.steps, end.best.name)
        self.state.global_step, self.state.best_model_checkpoint = end.steps, str(end.best)
        self._load_best_model()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the learning rate of each group."""
        groups = [{"params": group, "lr": self.rates[name]} for name, group in self.student.groups.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        """The loss on a batch of windows. Raises NotFiniteError."""
        loss = model(**inputs)
        if model.training and not everywhere(bool(loss.detach().isfinite())):
            raise NotFiniteError(self.state.global_step + 1)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss on a held-out batch; logits are not kept."""
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
    folder: Path, *, steps: int, batch_size: int, seed: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's settings; checkpoints go to `folder`, of which the best and the last are kept."""
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(WARM_UP_SHARE * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=interval(steps),
        save_strategy="steps",
        save_steps=interval(steps),
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=interval(steps),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
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
