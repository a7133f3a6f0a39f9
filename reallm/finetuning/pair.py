"""What is trained on what: the settings of a run, the packed model, the model it was made from, and the windows.

The last windows of the text are held out. Both models compute in the original's own bfloat16 where the machine is fast
in it, else in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from reallm.errors import UserError
from reallm.evaluation.compare import mask_window
from reallm.kernels.formats.terms import MAX_RANK, LowRank
from reallm.models.loaded import LoadedModel, load_model
from reallm.planner.tables.plan import Plan
from reallm.runtime.load import load
from reallm.runtime.packed import DecodeMode
from reallm.text.corpus import Text

from .chat_windows import SampledWindows, sample_windows
from .embedding_maps import EmbeddingMaps
from .factors import Init, Modules, trainable_modules
from .objective import Loss, Objective
from .processes import TrainingProcesses
from .stages import Stage, check_order
from .teacher import Teacher
from .trained import Part, check_parts

GAIN_RATE, MOST_GAIN_RATE = 1 / 120, 5e-3
"""Of scales and norms: the peak learning rate for each nat of divergence, and at most."""
CODEBOOK_RATE = 0.04
"""Of codebooks, in units of the root mean square of each: their learning rate over that of scales and norms."""
HELD_OUT_WINDOWS = 8
HELD_OUT_SHARE = 8  # at most one window in so many is held out, but always one


@dataclass(frozen=True)
class Training:
    """The settings of one run, all of which decide its result."""

    train: tuple[Part, ...] = ("factors", "scales", "norms")
    rank: int = 0
    factor_dtype: Literal["f16", "i8", "i4"] = "i8"
    init: Init = "lq-lora"
    """Where new factors start; "plan" adds none."""
    steps: int = 60
    batch_size: int = 1
    seqlen: int = 512
    learning_rate: float = 1e-3
    """Of factors; maps of embeddings learn at a tenth of it."""
    gain_learning_rate: float | None = None
    """Of scales and norms; None for `gain_rate`."""
    loss: Loss = "kl"
    """Against the original, or the cross entropy of the text itself."""
    patience: int = 3
    """Evaluations without a lower held-out KL after which training ends; 0 for never."""
    seed: int = 0
    order: tuple[Stage, ...] = ("end-to-end",)
    """The stages, one after another."""
    block_windows: int = 64
    """Of the training text, that block-wise training takes."""
    block_epochs: int = 2
    """How often it takes each."""
    code_steps: int = 4
    """After each block that gets new codes."""
    code_learning_rate: float = 1e-4
    """Of the weights that are still to be coded; norms learn at ten times that."""
    dora: bool = False
    """Train magnitudes of rows beside the factors; for an adapter only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_parts(self.train))
        object.__setattr__(self, "order", check_order(self.order))
        if self.block_windows < 1 or self.block_epochs < 1:
            expected = "expected at least 1 of each"
            raise UserError(f"--block-windows {self.block_windows} --block-epochs {self.block_epochs}: {expected}")
        if self.code_steps < 0 or not 0 < self.code_learning_rate < 1:
            found = f"--code-steps {self.code_steps} --code-learning-rate {self.code_learning_rate}"
            raise UserError(f"{found}: expected at least 0 steps, and a rate between 0 and 1 such as 1e-4")
        if self.loss == "text" and (stage := next((s for s in self.order if s != "end-to-end"), None)):
            raise UserError(f"--order {stage} brings a model nearer to the dense one: it goes with --loss kl only")
        if not 0 <= self.rank <= MAX_RANK:
            raise UserError(f"--rank {self.rank}: expected 0 to {MAX_RANK}")
        if self.factor_dtype not in ("f16", "i8", "i4"):
            raise UserError(f"--factor-dtype {self.factor_dtype}: expected f16, i8 or i4")
        if self.init not in get_args(Init):
            raise UserError(f"--init {self.init}: expected {', '.join(get_args(Init))}")
        if self.steps < 1 or self.batch_size < 1:
            raise UserError(f"--steps {self.steps} --batch-size {self.batch_size}: expected at least 1 of each")
        for option, rate in (("", self.learning_rate), ("gain-", self.gain_learning_rate)):
            if rate is not None and not 0 < rate < 1:
                raise UserError(f"--{option}learning-rate {rate}: expected a number between 0 and 1, such as 1e-3")
        if self.loss not in ("kl", "text"):
            raise UserError(f"--loss {self.loss}: expected kl, against the original, or text, against the text itself")
        if self.patience < 0:
            raise UserError(f"--patience {self.patience}: expected 0 or more evaluations")
        if self.seqlen < 8:
            raise UserError(f"--seqlen {self.seqlen}: expected at least 8 tokens")

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rate of each of `Trained.groups`."""
        gains = MOST_GAIN_RATE if self.gain_learning_rate is None else self.gain_learning_rate
        books = gains * CODEBOOK_RATE
        return {"factors": self.learning_rate, "gains": gains, "codebooks": books, "maps": self.learning_rate / 10}

    def gain_rate(self, divergence: float) -> float:
        """The peak learning rate of scales and norms of a model so far from the original, nats per token.

        What codes take from the size of weights is a share of their distortion, to which the divergence is
        proportional: at three bits a model wants a quarter of the steps that it wants at two.
        """
        if self.gain_learning_rate is not None or self.loss == "text":
            return self.rates["gains"]
        return min(MOST_GAIN_RATE, max(GAIN_RATE * divergence, MOST_GAIN_RATE / 100))

    @property
    def measure(self) -> str:
        """What the loss is called."""
        return "KL to the original" if self.loss == "kl" else "loss"

    @property
    def term(self) -> LowRank | None:
        """The low-rank term of a matrix that has none yet; None for none."""
        wanted = self.rank and self.init != "plan" and "factors" in self.train
        return LowRank(self.rank, self.factor_dtype) if wanted else None


@dataclass(frozen=True)
class Windows:
    """The dense model and the windows of the text, before there is a compressed model."""

    original: Teacher
    train: SampledWindows
    held_out: SampledWindows
    """No window of `train` is among them."""

    def release(self, rows: Tensor) -> None:
        """Free the dense model's weights for training on the windows `rows` of `train`, int64 [n], if that can be."""
        tokens, names = self.needed(rows)
        if self.original.keep_all(tokens, names):
            self.original.release()

    def needed(self, rows: Tensor) -> tuple[Tensor, list[int]]:
        """Token ids and names of the windows `rows` of `train`, each once, and of those held out."""
        parts = [self.train[torch.unique(rows)], self.held_out]
        return torch.cat([part.tokens for part in parts]), [name for part in parts for name in part.names.tolist()]


@dataclass(frozen=True)
class Pair:
    """The packed model, the one it was made from, and the windows they are compared on."""

    windows: Windows
    model: PreTrainedModel
    modules: Modules
    objective: Objective

    @property
    def original(self) -> LoadedModel:
        """The dense model; its weights are there after `restore`."""
        return self.windows.original.loaded

    @property
    def train(self) -> SampledWindows:
        """The windows that are trained on."""
        return self.windows.train

    @property
    def held_out(self) -> SampledWindows:
        """The windows that the gain is measured on."""
        return self.windows.held_out

    @torch.no_grad()
    def held_out_loss(self, maps: EmbeddingMaps | None = None) -> float:
        """Mean loss of the model on the held-out windows, nats per token; `maps` are those being trained."""
        place, total = self.model.device, 0.0
        for index in range(len(self.held_out.tokens)):
            window = self.held_out[index : index + 1]
            scored = None if window.scored is None else window.scored.to(place)
            total += float(self.objective(window.tokens.to(place), window.names.tolist(), scored, maps))
        return total / len(self.held_out.tokens)

    def release(self, rows: Tensor) -> None:
        """Free the original's weights for training on these windows of `train`, int64 [n], if nothing needs them there.

        Its head stays. `restore` brings them back.
        """
        if self.objective.can_remember(*self.windows.needed(rows)):
            self.windows.original.release()

    def restore(self) -> None:
        """Read the original's weights again, if they were freed."""
        self.windows.original.restore()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute them again in the backward pass instead of keeping them."""
    renamed = getattr(model, "activation_checkpointing_enable", None)  # by transformers on its way to 6
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # the layer's own flag only: its dropout stays off


def open_windows(
    artifact: Path,
    plan: Plan,
    teacher: Path | str | None,
    source: Text,
    training: Training,
    device: str,
    ranks: TrainingProcesses,
) -> Windows:
    """Load the model that `artifact` was made from and cut the text into windows; the last ones are held out.

    Raises UserError.
    """
    place = ranks.place(_device(device))
    original = load_model(teacher or plan.model)
    if original.digest != plan.model_sha256:
        raise UserError(f"{original.source} is not the model {artifact} was made from; give that one as --teacher")
    sample = _windows(original, source, training)
    mask_token = _mask_token(original)
    if mask_token is not None:
        if training.loss == "text":
            raise UserError(f"--loss text: {original.source} predicts masked tokens, not the next one; expected kl")
        shown = [mask_window(window, mask_token, training.seed + i).inputs for i, window in enumerate(sample.tokens)]
        sample = replace(sample, tokens=torch.cat(shown))
    count = min(HELD_OUT_WINDOWS, max(1, len(sample.tokens) // HELD_OUT_SHARE))
    dense = Teacher(original, sample.tokens[:1], place, _compute_dtype(original.dtype, place), ranks)
    return Windows(dense, sample[:-count], sample[-count:])


def open_pair(artifact: Path, windows: Windows, training: Training, *, low_memory: bool = False) -> Pair:
    """Load the compressed model, verified already, beside the dense one; `low_memory` keeps no decoded weights.

    Raises UserError.
    """
    original = windows.original
    decode: DecodeMode = "call" if low_memory else "load"
    model, _ = load(artifact, device=original.device, dtype=original.dtype, decode=decode, verify=False)
    modules = trainable_modules(model)
    objective = Objective(model, original, windows.train.tokens[:1], training.loss)
    if objective.head is None and training.loss == "kl":
        original.restore()  # the logits are needed, not what the head is given
    return Pair(windows, model, modules, objective)


def _device(name: str) -> torch.device:
    """The Trainer takes the first GPU or none."""
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {name}: expected cpu, or cuda where PyTorch finds a GPU")
    return torch.device(name)


def _tokenizer(original: LoadedModel) -> PreTrainedTokenizerBase:
    if original.tokenizer is None:
        raise UserError(f"{original.source} has no tokenizer; put its tokenizer files into the folder")
    return original.tokenizer


def _windows(original: LoadedModel, source: Text, training: Training) -> SampledWindows:
    """All windows of the text, at least two. Raises UserError."""
    sample = sample_windows(source, _tokenizer(original), training.seqlen, original.max_positions)
    if len(sample.tokens) < 2:
        raise UserError(
            f"{source.description}: one window of {training.seqlen} tokens found, two needed (one is held out); "
            "give a longer --text or a smaller --seqlen"
        )
    return sample


def _mask_token(original: LoadedModel) -> int | None:
    """The mask token of an encoder; None for a model that generates."""
    if not original.is_encoder:
        return None
    mask: int | None = _tokenizer(original).mask_token_id
    if mask is None:
        raise UserError(f"{original.source} neither generates nor has a mask token; expected a language model")
    return mask


def _compute_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own bfloat16 where the machine is fast in it, else float32; fp16 would overflow in the gradients."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if own == torch.bfloat16 and fast else torch.float32
