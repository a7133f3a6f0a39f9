"""Which factors are trained, and where they start. A term that is stored already goes on from where it is.

For a matrix without one, L R starts by `Init`

- zero      as LoRA and QLoRA: L = 0, R ~ N(0, 1 / cols) (arXiv 2106.09685, 2305.14314)
- loftq     the best approximation of W - W_hat, by its SVD (LoftQ's last step, arXiv 2310.08659; the codes are fixed)
- lq-lora   the best one in the norm sum_nk m_k E_nk^2, m_k the mean square of input k over some windows of the training
            text, the diagonal of H = X^T X / n (LQ-LoRA's weighted SVD, arXiv 2311.12023, with inputs for the Fisher)
- plan      not at all: only the plan's own factors are trained
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.codecs.metric import Metric, Workspace
from reallm.codecs.terms.low_rank import factorise
from reallm.kernels.formats.codecs import DenseCodec
from reallm.kernels.formats.terms import LowRank
from reallm.models.loaded import LoadedModel
from reallm.runtime.install import packed_modules
from reallm.runtime.training.magnitude import MagnitudeTraining
from reallm.runtime.training.scales import ScaleTraining

Modules = Mapping[str, MagnitudeTraining]
Init = Literal["zero", "loftq", "lq-lora", "plan"]
Snapshot = dict[str, tuple[Tensor, Tensor]]


def trainable_modules(model: nn.Module) -> dict[str, MagnitudeTraining]:
    """Every compressed linear of `model` by name; embeddings and experts have nothing to train."""
    return {
        name: module
        for name, module in packed_modules(model)
        if isinstance(module, MagnitudeTraining) and not isinstance(module.format.codec, DenseCodec)
    }


@torch.no_grad()
def column_moments(model: PreTrainedModel, modules: Modules, inputs: Tensor) -> dict[str, Tensor]:
    """Mean square of every input of each module over `inputs` (token ids [windows, seqlen]): float32 [cols]."""
    sums = {name: torch.zeros(module.cols) for name, module in modules.items()}
    hooks = [module.register_forward_pre_hook(_adder(sums[name])) for name, module in modules.items()]
    try:
        for window in inputs:
            model(input_ids=window[None].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / inputs.numel() for name, total in sums.items()}


def _adder(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        total.add_(arguments[0].detach().float().flatten(0, -2).square().sum(0).cpu())

    return add


def start_factors(
    original: LoadedModel, modules: Modules, moments: Mapping[str, Tensor], term: LowRank | None, init: Init
) -> None:
    """Make the factors of every module trainable; where there are none, those of `term` by `init`.

    A rank beyond the matrix's own is cut to it. Without a `term` every module must have factors. `moments` (see
    `column_moments`) are read by "lq-lora" only.
    """
    matrices = {matrix.name: matrix for matrix in original.matrices}
    for name, module in modules.items():
        if module.format.low_rank:
            module.train_low_rank()
            continue
        assert term is not None
        own = LowRank(min(term.rank, module.rows, module.cols), term.dtype)
        if init == "zero":
            module.train_low_rank(own.rank)
            continue
        error = original.weight(matrices[name]).cpu() - module.decode_now(torch.float32).cpu()
        weights = moments[name] if init == "lq-lora" else torch.ones(module.cols)
        metric = Metric(hessian=torch.diag(weights), fisher=weights.expand(module.rows, -1))
        found = factorise(error, own, Workspace(metric), in_hessian=False, seed=0)
        module.train_low_rank(own.rank)
        set_factors(module, found.left, found.right)


def factors_of(module: ScaleTraining) -> tuple[nn.Parameter, nn.Parameter]:
    """L and R of a module whose factors are being trained. Raises ValueError if they are not."""
    if module.left_factor is None or module.right_factor is None:
        raise ValueError("no low-rank factors are being trained; call train_low_rank() first")
    return module.left_factor, module.right_factor


def set_factors(module: ScaleTraining, left: Tensor, right: Tensor) -> None:
    """Overwrite the values of the factors being trained."""
    own_left, own_right = factors_of(module)
    with torch.no_grad():
        own_left.copy_(left)
        own_right.copy_(right)


def snapshot(modules: Modules) -> Snapshot:
    """Copies of all factors being trained."""
    pairs = {name: factors_of(module) for name, module in modules.items()}
    return {name: (left.detach().clone(), right.detach().clone()) for name, (left, right) in pairs.items()}


def restore(modules: Modules, factors: Snapshot) -> None:
    """Train on from `factors`, whether or not the modules were folded in the meantime."""
    for name, (left, right) in factors.items():
        modules[name].train_low_rank(left.shape[1])
        set_factors(modules[name], left, right)


def fold_all(modules: Modules, term: LowRank | None) -> None:
    """Write all factors back into the fields; new ones in the dtype of `term`. ValueError if one is not finite."""
    for module in modules.values():
        own = module.format.low_rank or term
        module.fold(None if own is None else own.dtype)
