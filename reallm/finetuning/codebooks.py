"""Which codebooks are trained, those that matrices share once, and the way back into their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.runtime.install import packed_modules
from reallm.runtime.packed import Packed, SharedCodebooks
from reallm.runtime.training.codebook import TrainedCodebook
from reallm.runtime.training.low_rank import packed_bytes

from .factors import Modules


@dataclass
class _SharedBook:
    """A codebook that matrices share: where it is kept, what it held before, and its values while they are trained."""

    holder: SharedCodebooks
    before: Tensor
    trained: TrainedCodebook


@dataclass
class Codebooks:
    """The codebooks and tables of levels of `modules`, linears of `model`.

    One that an embedding or an expert uses too stays as it is: those are not trained, and would change with it.
    """

    model: PreTrainedModel
    modules: Modules
    _shared: dict[str, _SharedBook] = field(default_factory=dict)

    def start(self) -> None:
        """Make every one trainable."""
        trainable = {id(module) for module in self.modules.values()}
        fixed = {key for key, users in self._users().items() if any(id(user) not in trainable for user in users)}
        for module in self.modules.values():
            if module.codebook_field is None:
                continue
            if module._shared is None:
                module.train_codebook()
                continue
            holder, key = module._shared
            if key in fixed:
                continue
            known = self._shared.get(key)
            book = module.train_codebook(None if known is None else known.trained)
            if known is None:
                self._shared[key] = _SharedBook(holder, holder[key].clone(), book)

    def parameters(self) -> list[nn.Parameter]:
        """One of every codebook."""
        own = [module.codebook.shift for module in self.modules.values() if module.codebook is not None]
        return own + [book.trained.shift for book in self._shared.values()]

    def fold(self) -> None:
        """Write the values into their fields. Raises ValueError if one is not finite in fp16."""
        raw = {key: packed_bytes(book.trained.rounded()) for key, book in self._shared.items()}
        for module in self.modules.values():
            if module.trained_codebook is not None:
                module.fold_codebook()
        self._write(raw)

    def restore(self) -> None:
        """What is shared, as it was before; the rest is each matrix's own to revert."""
        self._write({key: book.before for key, book in self._shared.items()})

    def _write(self, raw: dict[str, Tensor]) -> None:
        users = self._users()
        for key, values in raw.items():
            with torch.no_grad():
                self._shared[key].holder[key].copy_(values)
            for user in users[key]:
                user.forget()

    def _users(self) -> dict[str, list[Packed]]:
        found: dict[str, list[Packed]] = {}
        for _, packed in packed_modules(self.model):
            if packed._shared is not None:
                found.setdefault(packed._shared[1], []).append(packed)
        return found
