"""Training of codebooks: find those that can be trained, train a shared one once, and write them back into bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reallm.runtime.field_bytes import packed_bytes
from reallm.runtime.install import packed_modules
from reallm.runtime.packed import Packed, SharedCodebooks
from reallm.runtime.training.codebook import TrainedCodebook
from reallm.runtime.training.finish import write_back_codebook
from reallm.runtime.training.start import has_codebook, train_codebook

from .factors import PackedLinears


@dataclass
class _SharedCodebook:
    """A codebook that several matrices share."""

    holder: SharedCodebooks
    """The module that stores the codebook."""
    before: Tensor
    """The codebook's bytes before training."""
    trained: TrainedCodebook


@dataclass
class TrainableCodebooks:
    """The trainable codebooks and level tables of `linears`, which belong to `model`.

    A codebook that an embedding or an expert also uses is not trained, because the embedding or expert would change.
    """

    model: PreTrainedModel
    linears: PackedLinears
    _shared: dict[str, _SharedCodebook] = field(default_factory=dict)

    def start(self) -> None:
        """Make every codebook trainable."""
        trainable = {id(linear) for linear in self.linears.values()}
        fixed = {key for key, users in self._users().items() if any(id(user) not in trainable for user in users)}
        for linear in self.linears.values():
            if not has_codebook(linear):
                continue
            if linear.shared is None:
                train_codebook(linear)
                continue
            holder, key = linear.shared
            if key in fixed:
                continue
            known = self._shared.get(key)
            codebook = train_codebook(linear, None if known is None else known.trained)
            if known is None:
                self._shared[key] = _SharedCodebook(holder, holder[key].clone(), codebook)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters, one per codebook."""
        training = [m.training_part for m in self.linears.values() if m.training_part is not None]
        single = [part.codebook.shift for part in training if part.codebook is not None]
        return single + [book.trained.shift for book in self._shared.values()]

    def write_back(self) -> None:
        """Write the trained values into the packed fields. Raises ValueError if a value is not finite in fp16."""
        raw = {key: packed_bytes(book.trained.rounded()) for key, book in self._shared.items()}
        for linear in self.linears.values():
            write_back_codebook(linear)
        self._write_shared(raw)

    def reset_shared(self) -> None:
        """Restore the shared codebooks; a codebook that one matrix alone uses is restored by that matrix."""
        self._write_shared({key: book.before for key, book in self._shared.items()})

    def _write_shared(self, raw: dict[str, Tensor]) -> None:
        users = self._users()
        for key, values in raw.items():
            with torch.no_grad():
                self._shared[key].holder[key].copy_(values)
            for user in users[key]:
                user.drop_cache()

    def _users(self) -> dict[str, list[Packed]]:
        """Key of a shared codebook -> the packed matrices that use it."""
        users: dict[str, list[Packed]] = {}
        for _, packed in packed_modules(self.model):
            if packed.shared is not None:
                users.setdefault(packed.shared[1], []).append(packed)
        return users
