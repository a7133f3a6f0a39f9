"""The model that the stage "codes" trains: its first blocks are encoded, its later blocks are still float32 weights."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reallm.errors import UserError
from reallm.system.tensor_file import save_tensors

from .block_encoder import BlockEncoder
from .distillation import BETAS, training_order
from .norms import norms_of
from .objective import Objective
from .resolved_settings import ResolvedSettings
from .student_teacher import StudentTeacher, checkpoint_activations

MIN_WINDOWS = 64
"""The least number of windows to train on. They are those of the end-to-end stage, which the teacher runs anyway."""
NORM_RATE = 10
"""The learning rate of norms divided by that of the weights; it is larger because norm weights are few and near one."""


class PartlyEncodedModel:
    """A float32 copy of the dense model, whose first blocks hold decoded codes and whose other weights are trained."""

    def __init__(self, pair: StudentTeacher, encoder: BlockEncoder, settings: ResolvedSettings) -> None:
        self.pair, self.encoder, self.settings = pair, encoder, settings
        self.model = copy.deepcopy(pair.dense.model).float()  # the steps are smaller than bfloat16 can resolve
        self.loaded = replace(pair.dense, model=self.model)
        self.set_weights({matrix.name: encoder.decoded(matrix.name) for matrix in encoder.of_block(None)})
        self.model.requires_grad_(False)
        later = [m.parameter for number in encoder.blocks[1:] for m in encoder.of_block(number)]
        weights, norms = dict.fromkeys(later), [f"{name}.weight" for name in norms_of(self.model)]
        self.norms = {name: self.model.get_parameter(name) for name in norms}
        self.trained = {name: self.model.get_parameter(name) for name in (*weights, *norms)}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        rates = ((weights, settings.code_learning_rate), (norms, NORM_RATE * settings.code_learning_rate))
        groups = [{"params": [self.trained[name] for name in names], "lr": rate} for names, rate in rates]
        self.optimiser = torch.optim.Adam(groups, betas=BETAS)
        self.rates = [rate for _, rate in rates]
        self.objective = Objective(self.model, pair.data.teacher, pair.train.tokens[:1], "kl")
        if settings.gradient_checkpointing:
            checkpoint_activations(self.model)

    @torch.no_grad()
    def set_weights(self, decoded: Mapping[str, Tensor]) -> None:
        """Set the weights of the matrices named in `decoded` (name -> [rows, cols]) to the values there."""
        for matrix in self.encoder.matrices:
            if matrix.name in decoded:
                value, parameter = decoded[matrix.name], self.model.get_parameter(matrix.parameter)
                weight = parameter if matrix.expert is None else parameter[matrix.expert]
                weight.copy_(value.T if matrix.transposed else value)

    def encode_and_freeze(self, block: int) -> None:
        """Encode a block, set its weights to the decoded values, and stop training its weights and norms."""
        self.set_weights(self.encoder.encode_block(self.loaded, block))
        self.freeze(block)

    def freeze(self, block: int) -> None:
        """Stop training the weights and norms of `block`, and drop their Adam state."""
        for parameter in self.model.get_submodule(self.loaded.blocks[block]).parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            self.optimiser.state.pop(parameter, None)

    def train(self, index: int) -> None:
        """Make the optimiser steps that follow the encoding of the block at `index` of `encoder.blocks`.

        Raises UserError if the loss is not finite.
        """
        settings, block_count = self.settings, len(self.encoder.blocks)
        for step, rows in enumerate(self._window_order(index)):
            progress = (index + step / settings.code_steps) / (block_count - 1)
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            batch = self.pair.train[rows]
            scored = None if batch.scored is None else batch.scored.to(self.model.device)
            loss = self.objective(batch.tokens.to(self.model.device), batch.window_ids.tolist(), scored)
            if not bool(loss.detach().isfinite()):
                raise UserError(
                    f"after block {self.encoder.blocks[index]} the loss is not finite; nothing is written: "
                    "try a smaller --code-learning-rate"
                )
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()

    def _window_order(self, index: int) -> Tensor:
        """The rows of `pair.train` for the steps after the block at `index`, int64 [code_steps, batch_size]."""
        settings, train = self.settings, self.pair.train
        per_block = settings.code_steps * settings.batch_size
        pool = training_order(len(train.tokens), max(settings.steps * settings.batch_size, MIN_WINDOWS), settings.seed)
        picked = training_order(len(pool), per_block * len(self.encoder.blocks), settings.seed)
        rows = pool[picked[per_block * index : per_block * (index + 1)]]
        return rows.view(settings.code_steps, settings.batch_size)

    def save_state(self, path: Path, done: int) -> None:
        """Save everything that the rest of the run depends on, after `done` blocks have been encoded."""
        tensors = {"done": torch.tensor(done)}
        for number in self.encoder.blocks[:done]:
            for matrix in self.encoder.of_block(number):
                fields = self.encoder.packed[matrix.name].fields
                tensors |= {f"fields/{matrix.name}/{name}": raw.cpu() for name, raw in fields.items()}
        for name, parameter in self.trained.items():
            if parameter.requires_grad or name in self.norms:
                tensors[f"value/{name}"] = parameter.detach().cpu()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam/{key}/{name}"] = value.cpu()
        save_tensors(path, tensors)

    @torch.no_grad()
    def load_state(self, path: Path) -> int:
        """Load what `save_state` saved, if the file is readable; return the number of blocks done, 0 without a file."""
        try:
            state = load_file(path)
        except (OSError, SafetensorError):
            return 0
        done = int(state.pop("done"))
        fields: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            kind, rest = key.split("/", 1)
            if kind == "fields":
                matrix, name = rest.rsplit("/", 1)
                fields[matrix][name] = tensor
            elif kind == "value":
                self.trained[rest].copy_(tensor)
            else:
                name, parameter = rest.split("/", 1)
                self.optimiser.state[self.trained[parameter]][name] = tensor
        for matrix, stored in fields.items():
            self.encoder.write(matrix, stored)
        self.set_weights({matrix: self.encoder.decoded(matrix) for matrix in fields})
        for number in self.encoder.blocks[:done]:
            self.freeze(number)
        return done

    @torch.no_grad()
    def store_norms(self) -> None:
        """Copy the trained norms into the student, which already has the codes."""
        for name, parameter in self.norms.items():
            self.pair.student.get_parameter(name).copy_(parameter.to(self.pair.dense.dtype))
