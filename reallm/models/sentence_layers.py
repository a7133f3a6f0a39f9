"""The layers with weights that a sentence-transformers folder may have after the pooling, each in its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reallm.errors import UserError
from reallm.kernels.storage.layout import CONFIG_FILE, WEIGHTS_FILE

from .checkpoint import read_json

_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")


def dense_layer(folder: Path) -> nn.Module:
    """A Dense step: a linear layer and its activation. Raises UserError for one that cannot be read."""
    config = read_json(folder / CONFIG_FILE)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    usual = config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
    if activation not in _ACTIVATIONS or config.get("use_residual") or not usual:
        what = f"a Dense layer with {activation}, another input or a residual"
        raise UserError(f"{folder}: {what}; expected a plain layer with one of {', '.join(_ACTIVATIONS)}")
    tensors = _tensors(folder)
    weight, bias = tensors.get("linear.weight"), tensors.get("linear.bias")
    if weight is None or weight.ndim != 2:
        raise UserError(f"{folder / WEIGHTS_FILE} has no matrix linear.weight; get the file again")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    _fill(linear, {"weight": weight} | ({} if bias is None else {"bias": bias}), folder)
    return nn.Sequential(linear, getattr(nn, activation)())


def layer_norm(folder: Path) -> nn.Module:
    """A LayerNorm step. Raises UserError if it cannot be read."""
    tensors = {name.removeprefix("norm."): tensor for name, tensor in _tensors(folder).items()}
    norm = nn.LayerNorm(tensors["weight"].shape if "weight" in tensors else 1)
    _fill(norm, tensors, folder)
    return norm


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected the weights of a step after the pooling") from None


def _fill(module: nn.Module, values: Mapping[str, Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(values)
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit: {str(error).splitlines()[-1].strip()}") from None
    module.requires_grad_(False).eval()
