"""What transformers saves of a packed model: the whole model that is in memory, in files that name their format."""

from __future__ import annotations

from transformers import PreTrainedModel

from reallm.artifacts.quantization_config import QuantizationRecord
from reallm.errors import UserError
from reallm.kernels.storage.layout import METADATA

from .install import packed_modules

WAY_OUT = "save adapters with PEFT, train with `reallm finetune`, or call model.dequantize() first"


class FileMetadata(dict[str, str]):
    """The metadata of an artifact's weights files, in which transformers cannot set the format to its own "pt"."""

    def __init__(self) -> None:
        super().__init__(METADATA)

    def __setitem__(self, key: str, value: str) -> None:
        if key not in METADATA:
            super().__setitem__(key, value)


def check_savable(model: PreTrainedModel, record: QuantizationRecord) -> None:
    """Raise UserError if `save_pretrained` would lose something of `model`.

    It writes the packed fields and the record of the formats as loaded. So it would lose an adapter that was attached
    or trained, and it would write a dense weight where a matrix was replaced, as when embeddings are resized.
    """
    formats = {name: fmt.name for name, fmt in record.matrices()}
    packed = dict(packed_modules(model))
    for name, module in packed.items():
        known = formats.get(name) or formats.get(name.replace(".base_layer", ""))
        if module.gain is not None or (known is not None and module.format.name != known):
            raise UserError(f"save_pretrained would lose the adapter of {name}; {WAY_OUT}")
    modules = dict(model.named_modules())
    for name in formats:
        if name in modules and name not in packed and f"{name}.base_layer" not in packed:
            kind = type(modules[name]).__name__
            raise UserError(f"{name} is no longer packed but a {kind}, which save_pretrained cannot write; {WAY_OUT}")
