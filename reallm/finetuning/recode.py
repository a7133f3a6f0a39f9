"""New codes: blocks are coded one after another, and what is not coded yet is trained to make up for what is.

    for b = 0, 1, ...: code block b from its weights as they are now; train the weights of the blocks behind it and all
    norms from there on, by steps on KL(p_original || p_model), the blocks up to b held at what their codes decode to

as in incremental network quantisation (arXiv 1702.03044) and in the block-wise recipes of QuIP# and QTIP (arXiv
2402.04396, 2406.11235), but end to end. The formats, and so the bytes, stay those of the artifact; a matrix is coded in
the metric that it was measured in, so the measured folder must be there. Weights are trained in float32 by Adam, at a
rate that falls as a cosine: 16 bytes a weight of the model, and the original beside them.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from reallm.calibration.hidden_states import save_tensors
from reallm.codecs.encode import encode
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import PackedFields
from reallm.errors import UserError
from reallm.kernels.formats.codecs import DenseCodec
from reallm.measurement.encoding import Encoded, codebook_values
from reallm.models.loaded import LoadedModel, Matrix
from reallm.runtime.install import packed_modules
from reallm.runtime.packed import Packed
from reallm.system.threads import one_thread

from .distillation import BETAS, training_order
from .objective import Objective
from .pair import Pair, Training, checkpoint_activations
from .trained import norms_of

LOG = logging.getLogger(__name__)
STATE_FILE = "codes.safetensors"
SAVES = 5
"""How often a run keeps its state, about."""
CODE_WINDOWS = 64
"""At least so many windows of the text take part; those of the end-to-end stage, which the original sees anyway."""
NORM_RATE = 10
"""Of norms, whose weights are about one and few: their learning rate over that of the weights."""


def recode(
    pair: Pair, work: Path, training: Training, folder: Path, before: float, *, checkpointing: bool = False
) -> float:
    """Give the blocks of `pair.model` new codes and norms; `work` is the measured folder of the plan.

    Returns the loss on the held-out windows; unless it is less than `before`, the old codes and norms stay. Goes on
    where an interrupted run in `folder` kept its state last. With `checkpointing` activations are computed again.
    Raises UserError for a folder that is gone or of another model, and for a loss that is not finite.
    """
    coder = _Coder(pair, work)
    fields = {
        name: {field: raw.clone() for field, raw in packed.fields.items()} for name, packed in coder.packed.items()
    }
    norms = {name: norm.get_parameter("weight").clone() for name, norm in norms_of(pair.model).items()}
    student, path = _Student(pair, coder, training), folder / STATE_FILE
    if checkpointing:
        checkpoint_activations(student.model)
    done, count = student.restore(path), len(coder.blocks)
    every = max(1, count // SAVES)
    with tqdm(total=count, initial=done, desc="codes", unit="block", disable=not LOG.isEnabledFor(logging.INFO)) as bar:
        for index in range(done, count):
            student.settle(coder.blocks[index])
            if index + 1 < count and training.code_steps:
                student.train(index)
            if (index + 1) % every == 0 or index + 1 == count:
                student.save(path, index + 1)
            bar.update()
    student.hand_over()
    after = pair.held_out_loss()
    LOG.info("held-out loss %.4f nats per token, %.4f with new codes", before, after)
    if after < before:
        return after
    LOG.warning("new codes did not help: the old ones stay")
    for name, stored in fields.items():
        coder.write(name, stored)
    with torch.no_grad():
        for name, value in norms.items():
            pair.model.get_submodule(name).get_parameter("weight").copy_(value)
    return before


class _Coder:
    """Codes the matrices of a model in the formats of its artifact, and keeps the codes there."""

    def __init__(self, pair: Pair, work: Path) -> None:
        self.job = Encoded(work, pair.original).job
        self.packed: dict[str, Packed] = dict(packed_modules(pair.model))
        self.matrices = sorted(
            (m for m in pair.original.matrices if m.name in self.packed), key=lambda m: (-m.numel, m.name)
        )
        self.blocks = sorted({matrix.block for matrix in self.matrices if matrix.block is not None})

    def of_block(self, block: int | None) -> list[Matrix]:
        """The packed matrices of block number `block`, or of what lies outside the blocks; the largest first."""
        return [matrix for matrix in self.matrices if matrix.block == block]

    def code(self, loaded: LoadedModel, block: int) -> dict[str, Tensor]:
        """Code the matrices of `block` as their weights are in `loaded`; what they decode to, by name.

        An expert that is stored as plain floats keeps its values.
        """
        matrices = [m for m in self.of_block(block) if not isinstance(self.packed[m.name].format.codec, DenseCodec)]
        with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(partial(self._fields, loaded), matrices)
            for matrix, fields in zip(matrices, found, strict=True):
                self.write(matrix.name, {name: torch.from_numpy(value) for name, value in fields.items()})
        return {matrix.name: self.decoded(matrix.name) for matrix in self.of_block(block)}

    def _fields(self, loaded: LoadedModel, matrix: Matrix) -> PackedFields:
        packed = self.packed[matrix.name]
        fmt, raw = packed.format, packed.shared_codebooks
        books = None
        if raw is not None and fmt.shared_field is not None:
            books = codebook_values(fmt, {fmt.shared_field.name: raw.cpu().numpy()})
        work = Workspace(self.job.metric(matrix))
        return encode(loaded.weight(matrix).cpu(), fmt, work, shared=books, seed=self.job.seed)

    def write(self, name: str, fields: Mapping[str, Tensor]) -> None:
        """Put fields into the packed matrix called `name`."""
        packed = self.packed[name]
        packed.write((field, raw.to(packed.decoded.device)) for field, raw in fields.items())

    def decoded(self, name: str) -> Tensor:
        """W_hat [rows, cols] of a packed matrix, float32."""
        return self.packed[name].decode_now(torch.float32)


class _Student:
    """The dense model with coded blocks in it, and the training of what is not coded yet."""

    def __init__(self, pair: Pair, coder: _Coder, training: Training) -> None:
        self.pair, self.coder, self.training = pair, coder, training
        self.model = copy.deepcopy(pair.original.model).float()  # steps are smaller than what bfloat16 tells apart
        self.loaded = replace(pair.original, model=self.model)
        self.put({matrix.name: coder.decoded(matrix.name) for matrix in coder.of_block(None)})
        self.model.requires_grad_(False)
        behind = [m.parameter for number in coder.blocks[1:] for m in coder.of_block(number)]
        weights, norms = dict.fromkeys(behind), [f"{name}.weight" for name in norms_of(self.model)]
        self.norms = {name: self.model.get_parameter(name) for name in norms}
        self.trained = {name: self.model.get_parameter(name) for name in (*weights, *norms)}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        rates = ((weights, training.code_learning_rate), (norms, NORM_RATE * training.code_learning_rate))
        groups = [{"params": [self.trained[name] for name in names], "lr": rate} for names, rate in rates]
        self.optimiser = torch.optim.Adam(groups, betas=BETAS)
        self.rates = [rate for _, rate in rates]
        self.objective = Objective(self.model, pair.windows.original, pair.train.tokens[:1], "kl")

    @torch.no_grad()
    def put(self, decoded: Mapping[str, Tensor]) -> None:
        """Hold the matrices called so at these values, [rows, cols]."""
        for matrix in self.coder.matrices:
            if matrix.name in decoded:
                value, parameter = decoded[matrix.name], self.model.get_parameter(matrix.parameter)
                place = parameter if matrix.expert is None else parameter[matrix.expert]
                place.copy_(value.T if matrix.transposed else value)

    def settle(self, block: int) -> None:
        """Code a block; its weights and norms are trained no longer."""
        self.put(self.coder.code(self.loaded, block))
        self.freeze(block)

    def freeze(self, block: int) -> None:
        """Train the weights and norms of `block` no longer, and forget what Adam knows of them."""
        for parameter in self.model.get_submodule(self.loaded.blocks[block]).parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            self.optimiser.state.pop(parameter, None)

    def train(self, index: int) -> None:
        """The steps that follow block number `index` of those that are coded.

        Raises UserError for a loss that is not finite.
        """
        training, pair = self.training, self.pair
        each, total = training.code_steps * training.batch_size, len(self.coder.blocks)
        pool = training_order(
            len(pair.train.tokens), max(training.steps * training.batch_size, CODE_WINDOWS), training.seed
        )
        picked = training_order(len(pool), each * total, training.seed)[each * index : each * (index + 1)]
        order = pool[picked]
        for step, rows in enumerate(order.view(training.code_steps, training.batch_size)):
            share = (index + step / training.code_steps) / (total - 1)
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
            part = pair.train[rows]
            scored = None if part.scored is None else part.scored.to(self.model.device)
            loss = self.objective(part.tokens.to(self.model.device), part.names.tolist(), scored)
            if not bool(loss.detach().isfinite()):
                raise UserError(
                    f"behind block {self.coder.blocks[index]} the loss is not finite; nothing is written: "
                    "try a smaller --code-learning-rate"
                )
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self, path: Path, done: int) -> None:
        """Keep all that the rest of the run depends on, after `done` blocks."""
        tensors = {"done": torch.tensor(done)}
        for number in self.coder.blocks[:done]:
            for matrix in self.coder.of_block(number):
                fields = self.coder.packed[matrix.name].fields
                tensors |= {f"fields/{matrix.name}/{name}": raw.cpu() for name, raw in fields.items()}
        for name, parameter in self.trained.items():
            if parameter.requires_grad or name in self.norms:
                tensors[f"value/{name}"] = parameter.detach().cpu()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam/{key}/{name}"] = value.cpu()
        save_tensors(path, tensors)

    @torch.no_grad()
    def restore(self, path: Path) -> int:
        """Take on what `save` kept, if there is a whole file; how many blocks are done."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError):
            return 0
        done = int(found.pop("done"))
        fields: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in found.items():
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
            self.coder.write(matrix, stored)
        self.put({matrix: self.coder.decoded(matrix) for matrix in fields})
        for number in self.coder.blocks[:done]:
            self.freeze(number)
        return done

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the compressed model the norms; it has the codes."""
        for name, parameter in self.norms.items():
            own = self.pair.model.get_parameter(name)
            own.copy_(parameter.to(self.pair.original.dtype))
