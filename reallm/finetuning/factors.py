"""Low-rank factors: which matrices have trainable factors, and how new factors L [rows, rank], R [rank, cols] start.

A matrix that already stores a low-rank term starts from that term. For other matrices, `FactorInit` decides:

- zero      as in LoRA and QLoRA: L = 0, R ~ N(0, 1 / cols) (arXiv 2106.09685, 2305.14314)
- loftq     the best approximation of W - W_hat, by SVD (the last step of LoftQ, arXiv 2310.08659; codes do not change)
- lq-lora   the best approximation in the norm sum_nk m_k E_nk^2, where m_k is the mean square of input k over some
            windows of the training text, the diagonal of H = X^T X / n (LQ-LoRA's weighted SVD, arXiv 2311.12023, with
            input moments in place of the Fisher information)
- plan      no new factors: only the factors that the plan contains are trained
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.terms.low_rank import factorise
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.terms import LowRank
from reallm.models.loaded import LoadedModel
from reallm.runtime.install import packed_modules
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.training.finish import write_back_low_rank
from reallm.runtime.training.start import train_low_rank

from .settings import FactorInit

PackedLinears = Mapping[str, CompressedLinear]
"""Compressed linears by name."""
FactorValues = dict[str, tuple[Tensor, Tensor]]
"""Name of a matrix -> L [rows, rank], R [rank, cols]."""


def trainable_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Every compressed linear of `model` by name; compressed embeddings and experts are left out: they are not
    trained.
    """
    return {
        name: module
        for name, module in packed_modules(model)
        if isinstance(module, CompressedLinear) and not isinstance(module.format.codec, DenseCodec)
    }


@torch.no_grad()
def input_moments(model: PreTrainedModel, linears: PackedLinears, windows: Tensor) -> dict[str, Tensor]:
    """Name of linear -> mean square of its input features, float32 [cols], over `windows` (token ids [n, seqlen])."""
    sums = {name: torch.zeros(linear.cols) for name, linear in linears.items()}
    hooks = [linear.register_forward_pre_hook(_square_adder(sums[name])) for name, linear in linears.items()]
    try:
        for window in windows:
            model(input_ids=window[None].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / windows.numel() for name, total in sums.items()}


def _square_adder(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        total.add_(arguments[0].detach().float().flatten(0, -2).square().sum(0).cpu())

    return add


def start_factors(
    dense: LoadedModel,
    linears: PackedLinears,
    moments: Mapping[str, Tensor],
    new_factors: LowRank | None,
    init: FactorInit,
) -> None:
    """Make the factors of every linear trainable; a linear without factors gets `new_factors`, which
    the method `init` initialises.

    The rank is at most the smaller side of the matrix. If `new_factors` is None, every linear must have factors.
    `moments` (see `input_moments`) are used by "lq-lora" only.
    """
    matrices = {matrix.name: matrix for matrix in dense.matrices}
    for name, linear in linears.items():
        if linear.format.low_rank:
            train_low_rank(linear)
            continue
        assert new_factors is not None
        term = LowRank(min(new_factors.rank, linear.rows, linear.cols), new_factors.dtype)
        if init == "zero":
            train_low_rank(linear, term.rank)
            continue
        error = dense.weight(matrices[name]).cpu() - linear.decode_now(torch.float32).cpu()
        weights = moments[name] if init == "lq-lora" else torch.ones(linear.cols)
        metric = Metric(hessian=torch.diag(weights), fisher=weights.expand(linear.rows, -1))
        start = factorise(error, term, Workspace(metric), in_hessian=False, seed=0)
        train_low_rank(linear, term.rank)
        set_factors(linear, start.left, start.right)


def factors_of(linear: CompressedLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """L and R of a linear whose factors are being trained. Raises ValueError if they are not."""
    part = linear.training_part
    if part is None or part.left_factor is None or part.right_factor is None:
        raise ValueError("no low-rank factors are being trained; call train_low_rank() first")
    return part.left_factor, part.right_factor


def set_factors(linear: CompressedLinear, left: Tensor, right: Tensor) -> None:
    """Overwrite the values of the factors that are being trained."""
    trained_left, trained_right = factors_of(linear)
    with torch.no_grad():
        trained_left.copy_(left)
        trained_right.copy_(right)


def copy_factors(linears: PackedLinears) -> FactorValues:
    """Copies of all factors that are being trained."""
    pairs = {name: factors_of(linear) for name, linear in linears.items()}
    return {name: (left.detach().clone(), right.detach().clone()) for name, (left, right) in pairs.items()}


def restart_factors(linears: PackedLinears, factors: FactorValues) -> None:
    """Resume training from the values `factors`, even if the linears' factors have been written back since."""
    for name, (left, right) in factors.items():
        train_low_rank(linears[name], left.shape[1])
        set_factors(linears[name], left, right)


def write_back_factors(linears: PackedLinears, new_factors: LowRank | None) -> None:
    """Write all factors into the packed fields, new factors in the dtype of `new_factors`.

    Raises ValueError if a value is not finite.
    """
    for linear in linears.values():
        term = linear.format.low_rank or new_factors
        write_back_low_rank(linear, None if term is None else term.dtype)
