"""End-to-end training with transformers' Trainer; the loss is the divergence from the teacher.

    loss = mean over tokens of KL(p || q) = sum_v p_v (log p_v - log q_v),   p the teacher's, q the student's

The loss is computed in float32, whatever dtype the models compute in, and without the full logits in memory if the head
is a plain matrix (`objective`). The optimiser is AdamW with one learning rate per parameter group, a cosine schedule
after 3% of warm-up, and gradients clipped at norm 1. The state with the lowest loss on held-out windows is kept; a loss
that is not finite ends training. The seed fixes the order of the windows and there is no dropout, so a resumed run
gives exactly the result of an uninterrupted one.
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
from .processes import true_in_all_processes

LOG = logging.getLogger(__name__)
BETAS = (0.9, 0.95)
"""AdamW's betas; the second is lower than usual because runs are short."""
WARM_UP_SHARE = 0.03
MAX_EVALUATION_STEPS = 50
MIN_EVALUATIONS = 5
"""Minimum number of evaluations in a run; a run with fewer steps than this evaluates after every step."""


class NotFiniteError(ArithmeticError):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


class WindowDataset(Dataset[dict[str, Tensor]]):
    """SampledWindows as the Trainer's dataset; the same window may occur more than once."""

    def __init__(self, sample: SampledWindows) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return len(self.sample.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.sample
        row = {"input_ids": sample.tokens[index], "window_ids": sample.window_ids[index]}
        return row if sample.scored is None else row | {"scored": sample.scored[index]}


class DistillationLoss(nn.Module):
    """The loss as a module whose parameters are the trained ones only, so that checkpoints contain nothing else."""

    def __init__(self, objective: Objective, groups: Mapping[str, Sequence[nn.Parameter]], maps: EmbeddingMaps) -> None:
        super().__init__()
        self.objective, self.maps = objective, maps
        self.groups = {name: list(group) for name, group in groups.items() if group}
        self.trained = nn.ParameterList([parameter for group in self.groups.values() for parameter in group])

    def forward(self, input_ids: Tensor, window_ids: Tensor, scored: Tensor | None = None) -> Tensor:
        """The mean loss of a batch of windows, as `WindowDataset` gives them."""
        return self.objective(input_ids, window_ids.tolist(), scored, self.maps)


class DistillationTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Minimises a DistillationLoss on windows in the order in which they are given."""

    def __init__(
        self,
        loss: DistillationLoss,
        *,
        arguments: TrainingArguments,
        learning_rates: Mapping[str, float],
        train: SampledWindows,
        held_out: SampledWindows,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """`learning_rates`: the peak learning rate of each of `loss.groups`."""
        super().__init__(loss, arguments, train_dataset=WindowDataset(train), eval_dataset=WindowDataset(held_out))
        self.distillation_loss, self.learning_rates = loss, learning_rates
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # writes dictionaries to stdout
                self.remove_callback(callback)
        for callback in callbacks:
            self.add_callback(callback)

    def train_or_resume(self, folder: Path, checkpoint: Path | None) -> None:
        """Train from `checkpoint` on (None: from the start), or load the best state if training in `folder` has ended.

        Raises NotFiniteError for a loss that is not finite.
        """
        end = read_end(folder)
        if end is None:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        LOG.info("training ended after step %d; its best state, %s, is loaded", end.steps, end.best.name)
        self.state.global_step, self.state.best_model_checkpoint = end.steps, str(end.best)
        self._load_best_model()

    def load_best_state(self) -> str | None:
        """Load the best checkpoint of this run and return its name; None if there is none yet."""
        best = self.state.best_model_checkpoint
        if best is None:
            return None
        self._load_best_model()
        return Path(best).name

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the learning rate of each group."""
        groups = [
            {"params": group, "lr": self.learning_rates[name]} for name, group in self.distillation_loss.groups.items()
        ]
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
        if model.training and not true_in_all_processes(bool(loss.detach().isfinite())):
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
        """Save a checkpoint. Raises UserError if the file cannot be written, which torch reports as a RuntimeError."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self.args.output_dir}: a checkpoint cannot be written ({reason}); free some space and run the same "
                "command again: it continues from the last checkpoint"
            ) from error

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class FinalEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Requests an evaluation after the last step, even if the interval does not end there."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **unused: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def evaluation_interval(steps: int) -> int:
    """Number of steps between two checkpoints in a run of `steps` steps; each checkpoint includes an evaluation."""
    return min(MAX_EVALUATION_STEPS, max(1, steps // MIN_EVALUATIONS))


def training_arguments(
    folder: Path, *, steps: int, batch_size: int, seed: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's settings. Checkpoints go to `folder`; the best and the last are kept."""
    interval = evaluation_interval(steps)
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
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=interval,
        report_to="none",
        disable_tqdm=True,  # ProgressCallback shows one bar for the whole run instead
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=device.type == "cpu",
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs must not become a DataParallel
    return arguments


def training_order(count: int, total: int, seed: int) -> Tensor:
    """The order of the windows: `total` indices below `count`, int64 [total], from concatenated random permutations."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-total // count))]
    return torch.cat(rounds)[:total]
