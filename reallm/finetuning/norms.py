"""Training of normalisation weights by a relative gain, so that one learning rate suits weights of any magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class RelativeGain(nn.Module):
    """Parametrises a weight w as w + unit * gain. `gain` is float32 and starts at 0; `unit` is the effective
    multiplier.

    `unit` is w itself, or 1 where the model applies 1 + w, as Gemma's norms do.
    """

    def __init__(self, weight: Tensor, about_one: bool) -> None:
        super().__init__()
        self.unit = torch.ones_like(weight) if about_one else weight.detach().clone()
        self.gain = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        """The trained weight, in the dtype of `weight`."""
        return (weight.float() + self.unit.float() * self.gain).to(weight.dtype)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation modules of `model` that have a one-dimensional weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 1
    }


def norm_weight(norm: nn.Module) -> Tensor:
    """The weight of `norm`, detached."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def start_norms(model: nn.Module) -> None:
    """Give the weight of every norm a trainable gain."""
    for norm in norms_of(model).values():
        about_one = "gemma" in type(norm).__name__.lower()
        gain = RelativeGain(norm_weight(norm), about_one)
        parametrize.register_parametrization(norm, "weight", gain, unsafe=True)


def trained_norms(model: nn.Module) -> dict[str, RelativeGain]:
    """The gains that are being trained, by the name of their norm."""
    gains = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            gain = module.parametrizations.weight[0]
            if isinstance(gain, RelativeGain):
                gains[name] = gain
    return gains


def remove_gains(model: nn.Module) -> None:
    """Remove the gains; the weights are those from before training."""
    for name in trained_norms(model):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=False)


def write_back_norms(model: nn.Module, stored_dtype: torch.dtype) -> None:
    """Multiply the gains into the weights, round the weights to `stored_dtype`, and remove the gains."""
    trained = {name: norm_weight(model.get_submodule(name)).clone() for name in trained_norms(model)}
    remove_gains(model)
    set_norms(model, trained, stored_dtype)


@torch.no_grad()
def set_norms(model: nn.Module, weights: Mapping[str, Tensor], stored_dtype: torch.dtype) -> None:
    """Set the norms named in `weights` to the given values, rounded to `stored_dtype`."""
    for name, value in weights.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_(value.to(stored_dtype))
