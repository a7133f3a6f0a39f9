"""Read the decode step of a transformers model as a dataflow graph (`codegen.decode_step.graph.StepGraph`).

Names alone are not trusted. The classes must be transformers' own, of an architecture listed here; every module must
have exactly the children and parameters that the graph covers; norms and activations are run on a few numbers and
compared with the formula that the graph will use; and rotary tables are computed by the model's own module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from transformers import PreTrainedModel

from reallm.codegen.decode_step.graph import StepGraph, Value
from reallm.codegen.decode_step.operations import (
    Activation,
    Add,
    Attention,
    Embed,
    Gate,
    Linear,
    Norm,
    Rotary,
    Softcap,
    Token,
    Weight,
)
from reallm.runtime.modules import CompressedEmbedding, CompressedLinear, TiedHead
from reallm.runtime.packed import Packed, SharedCodebooks
from reallm.system.torch_dtypes import FLOAT_NAMES

from .rotary import StepUnsupportedError, rotary_table

_CHANGING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles depend on the length of the text."""


@dataclass(frozen=True)
class Family:
    """Properties of a supported architecture that its modules do not show."""

    window: Literal["", "config", "layers"] = ""
    """Sliding windows: none, one for all layers, or one for the layers that the configuration lists as sliding."""
    sandwich: bool = False
    """Whether there are norms after attention and MLP too, before their outputs are added."""
    softcap: bool = False
    """Whether attention scores are capped by attn_logit_softcapping."""
    rope_by_layer: bool = False
    """Whether the rotary embedding depends on the kind of the layer."""


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window="config"),
    "Qwen2ForCausalLM": Family(window="layers"),
    "Qwen3ForCausalLM": Family(window="layers"),
    "GemmaForCausalLM": Family(),
    "Gemma2ForCausalLM": Family(window="layers", sandwich=True, softcap=True),
    "Gemma3ForCausalLM": Family(window="layers", sandwich=True, rope_by_layer=True),
}


def read_step(model: PreTrainedModel) -> StepGraph:
    """The decode step of `model` as a dataflow graph. Raises StepUnsupportedError."""
    family = FAMILIES.get(type(model).__name__)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        known = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        _refuse(f"{type(model).__name__} is not among the supported architectures ({known})")
    _check_plain(model)
    return _Reader(model, family).read()


def _refuse(reason: str) -> NoReturn:
    raise StepUnsupportedError(reason)


def _check_plain(model: PreTrainedModel) -> None:
    """Refuse a model with hooks or replaced methods, in training mode, or spread over devices."""
    if model.training:
        _refuse("the model is in training mode")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            _refuse(f"{name or 'the model'} has a hook")
    if replaced := {"prepare_inputs_for_generation", "__call__"} & vars(model).keys():
        _refuse(f"{min(replaced)} of the model was replaced")
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or not min(devices).startswith(("cpu", "cuda")):
        _refuse(f"the model is on {', '.join(sorted(devices))}; expected one device, a CPU or a CUDA GPU")


class _Reader:
    """Builds the dataflow graph of a model whose architecture has the properties `family`."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.family, self.config = model, family, model.config
        self.graph = StepGraph(type(model).__name__)
        self.package = type(model).__module__

    def read(self) -> StepGraph:
        self.children("", {"model", "lm_head"})
        self.children("model", {"embed_tokens", "layers", "norm", "rotary_emb"})
        if self.count("model.layers") != self.config.num_hidden_layers:
            _refuse(f"model.layers has {self.count('model.layers')} layers, not {self.config.num_hidden_layers}")
        scale, embedding = self.embedding("model.embed_tokens")
        x = self.graph.add("embed", Embed(embedding, scale), self.graph.add("token", Token()))
        for index in range(self.config.num_hidden_layers):
            x = self.layer(index, x)
        x = self.norm("norm", "model.norm", embedding.cols, x)
        head = self.linear("lm_head", embedding.cols)
        x = self.graph.add("head", Linear((head,)), x)
        if cap := getattr(self.config, "final_logit_softcapping", None):
            self.graph.add("cap", Softcap(head.rows, float(cap)), x)
        return self.graph

    def layer(self, index: int, x: Value) -> Value:
        path, hidden = f"model.layers.{index}", self.graph.width(x)
        sandwich = {"pre_feedforward_layernorm", "post_feedforward_layernorm"} if self.family.sandwich else set()
        self.children(path, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} | sandwich)
        y = self.norm(f"{index}.attn_norm", f"{path}.input_layernorm", hidden, x)
        y = self.attention(index, y)
        if sandwich:
            y = self.norm(f"{index}.attn_post", f"{path}.post_attention_layernorm", hidden, y)
        x = self.graph.add(f"{index}.attn_sum", Add(hidden), x, y)
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        y = self.norm(f"{index}.mlp_norm", f"{path}.{before}", hidden, x)
        y = self.mlp(index, y)
        if sandwich:
            y = self.norm(f"{index}.mlp_post", f"{path}.post_feedforward_layernorm", hidden, y)
        return self.graph.add(f"{index}.mlp_sum", Add(hidden), x, y)

    def attention(self, index: int, x: Value) -> Value:
        path = f"model.layers.{index}.self_attn"
        module: Any = self.module(path)
        head_norms = "q_norm" in dict(module.named_children())
        projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
        self.children(path, projections | ({"q_norm", "k_norm"} if head_norms else set()))
        if not module.is_causal:
            _refuse(f"{path} is not causal")
        head_dim, hidden = int(module.head_dim), self.graph.width(x)
        q, k, v = (self.linear(f"{path}.{name}_proj", hidden) for name in "qkv")
        heads, kv_heads = q.rows // head_dim, k.rows // head_dim
        if (q.rows, k.rows, v.rows) != (heads * head_dim, kv_heads * head_dim, k.rows) or heads % kv_heads:
            _refuse(f"{path} projects to {q.rows}, {k.rows} and {v.rows}, which are not whole heads of {head_dim}")
        if heads // kv_heads != module.num_key_value_groups:
            _refuse(f"{path} shares a key among {module.num_key_value_groups} heads, not {heads // kv_heads}")
        values = {
            name: self.graph.add(f"{index}.{name}", Linear((w,)), x) for name, w in zip("qkv", (q, k, v), strict=True)
        }
        table = self.rotation(index, head_dim)
        for name, count in (("q", heads), ("k", kv_heads)):
            if head_norms:
                values[name] = self.norm(f"{index}.{name}_norm", f"{path}.{name}_norm", head_dim, values[name], count)
            values[name] = self.graph.add(f"{index}.{name}_rotary", Rotary(count, head_dim, table), values[name])
        cap = module.attn_logit_softcapping if self.family.softcap else None
        op = Attention(index, heads, kv_heads, head_dim, float(module.scaling), self.window(index), cap and float(cap))
        y = self.graph.add(f"{index}.attend", op, values["q"], values["k"], values["v"])
        return self.graph.add(f"{index}.o", Linear((self.linear(f"{path}.o_proj", q.rows),)), y)

    def mlp(self, index: int, x: Value) -> Value:
        path, hidden = f"model.layers.{index}.mlp", self.graph.width(x)
        self.children(path, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        gate, up = (self.linear(f"{path}.{name}_proj", hidden) for name in ("gate", "up"))
        gated = self.graph.add(f"{index}.gate", Linear((gate,)), x)
        op = Gate(self.activation(f"{path}.act_fn"), gate.rows)
        y = self.graph.add(f"{index}.act", op, gated, self.graph.add(f"{index}.up", Linear((up,)), x))
        return self.graph.add(f"{index}.down", Linear((self.linear(f"{path}.down_proj", gate.rows),)), y)

    def module(self, path: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(path)
        return module

    def count(self, path: str) -> int:
        return len(list(self.module(path).children()))

    def children(self, path: str, expected: Iterable[str]) -> None:
        """Check that `path` has exactly the children `expected`, no parameters, and a class of the model's own file."""
        module, label = self.module(path), path or type(self.model).__name__
        if type(module).__module__ != self.package:
            _refuse(f"{label} is a {type(module).__name__} from {type(module).__module__}")
        names = {name for name, _ in module.named_children() if name != SharedCodebooks.NAME}
        if difference := names ^ set(expected):
            _refuse(f"{label} has additional or missing parts: {', '.join(sorted(difference))}")
        if list(module.parameters(recurse=False)):
            _refuse(f"{label} has parameters itself, not only in its parts")

    def norm(self, name: str, path: str, width: int, x: Value, groups: int = 1) -> Value:
        """Add a norm, after testing on a few numbers which formula the module follows."""
        module: Any = self.module(path)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if (
            type(module).__module__ != self.package
            or [n for n, _ in module.named_parameters()] != ["weight"]
            or not eps
        ):
            _refuse(f"{path} is a {type(module).__name__}, not a supported norm")
        weight = module.weight.detach().float()
        if tuple(weight.shape) != (width,):
            _refuse(f"{path} has weights of shape {tuple(weight.shape)}, not [{width}]")
        probe = torch.linspace(-2, 3, width, device=weight.device)
        with torch.no_grad():
            output = module(probe).float()
        scaled = probe * torch.rsqrt(probe.square().mean() + eps)
        for plus_one in (False, True):
            if torch.allclose(output, scaled * (weight + plus_one), rtol=1e-4, atol=1e-5):
                return self.graph.add(name, Norm(path, width, float(eps), plus_one, groups), x)
        _refuse(f"{path}, a {type(module).__name__}, does not compute a root mean square norm")

    def linear(self, path: str, cols: int) -> Weight:
        module: Any = self.module(path)
        if type(module) not in (nn.Linear, CompressedLinear, TiedHead):
            _refuse(f"{path} is a {type(module).__name__}, not a supported linear module")
        if isinstance(module, CompressedLinear) and module.in_training:
            _refuse(f"parts of {path} are being trained")
        weight = _weight(path, module, module.bias is not None)
        if weight.cols != cols:
            _refuse(f"{path} reads {weight.cols} values, not {cols}")
        return weight

    def embedding(self, path: str) -> tuple[float, Weight]:
        """(factor, matrix): the embedding returns rows of the matrix, multiplied by the factor."""
        module: Any = self.module(path)
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            _refuse(f"{path} is a {type(module).__name__}, not a supported embedding")
        weight = _weight(path, module, False)
        if type(module) in (nn.Embedding, CompressedEmbedding):
            return 1.0, weight
        model_classes = [base for base in type(module).__mro__ if base.__module__ == self.package]
        dtype = module.decoded.dtype if isinstance(module, Packed) else module.weight.dtype
        if len(model_classes) != 1 or not hasattr(module, "embed_scale"):
            _refuse(f"{path} is a {type(module).__name__}, not a supported embedding")
        scale: Any = module.embed_scale
        return float(scale.to(dtype)), weight

    def activation(self, path: str) -> Activation:
        module, probe = self.module(path), torch.linspace(-4, 4, 33)
        known: dict[Activation, Tensor] = {"silu": silu(probe), "gelu_tanh": gelu(probe, approximate="tanh")}
        with torch.no_grad():
            output = module(probe)
        for name, values in known.items():
            if torch.allclose(output, values, rtol=1e-5, atol=1e-6):
                return name
        _refuse(f"{path}, a {type(module).__name__}, is neither silu nor gelu with tanh")

    def window(self, index: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        sliding = self.family.window == "config" or (
            self.family.window == "layers" and kinds is not None and kinds[index] == "sliding_attention"
        )
        size = getattr(self.config, "sliding_window", None)
        return int(size) if sliding and size else None

    def rotation(self, index: int, head_dim: int) -> str:
        """The name of the layer's rotary table: "rope", or "rope.<kind of layer>"."""
        module: Any = self.module("model.rotary_emb")
        kind = self.config.layer_types[index] if self.family.rope_by_layer else ""
        rope = module.rope_type[kind] if kind else module.rope_type
        if rope in _CHANGING_ROPE:
            _refuse(f"the rotary embedding is {rope!r}, which changes with the length of the text")
        name = f"rope.{kind}" if kind else "rope"
        cosines, sines = rotary_table(self.model, name, 2)
        half = head_dim // 2
        if type(module).__module__ != self.package or cosines.shape != (2, half) or sines.shape != (2, half):
            _refuse(f"the rotary embedding rotates {2 * cosines.shape[1]} of the {head_dim} values of a head")
        return name


def _weight(path: str, module: Any, bias: bool) -> Weight:
    holder = module.source if isinstance(module, TiedHead) else module
    if isinstance(holder, Packed):
        native = holder.native
        transform = f"{native.operand.input_key:016x}" if native else ""
        fmt = holder.format
        permuted = native is not None and fmt.permuted and not fmt.sparse and not fmt.low_rank
        return Weight(path, holder.rows, holder.cols, fmt.name, bias, transform, permuted)
    kind = FLOAT_NAMES.get(holder.weight.dtype)
    if kind is None:
        _refuse(f"{path} is {holder.weight.dtype}")
    rows, cols = holder.weight.shape
    return Weight(path, rows, cols, kind, bias)
