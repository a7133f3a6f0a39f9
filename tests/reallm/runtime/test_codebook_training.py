"""Trainable codebooks: the outputs of the decoded weight, exact gradients, a way back into the bytes, shared ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import random_packed
from torch import nn
from tuning import SEQLEN, kl, linears, pack

from reallm.artifacts.verify import read_bytes, read_tensors, verify
from reallm.errors import UserError
from reallm.finetuning.codebooks import TrainableCodebooks
from reallm.finetuning.factors import trainable_linears
from reallm.finetuning.run import finetune
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import Matrix
from reallm.planner.tables.plan import read_plan
from reallm.runtime.convert import pack_linear
from reallm.runtime.field_bytes import packed_bytes
from reallm.runtime.install import packed_modules
from reallm.runtime.load import load
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.packed import SharedCodebooks
from reallm.runtime.training.finish import revert, write_back_codebook, write_back_scales
from reallm.runtime.training.start import has_codebook, train_codebook, train_scales

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLS = 24, 40
FORMATS = ("aq2x4-d4", "aq1x8-d8+cs", "aq1x4-d4+r2i8", "aq2x4-d4-shared", "km3", "km2+perm+o5", "aq1x4-d2+rot")
RUN: dict[str, Any] = {
    "train": ("codebooks",),
    "rank": 0,
    "steps": 24,
    "batch_size": 2,
    "seqlen": SEQLEN,
    "gain_learning_rate": 5e-2,
    "patience": 0,
    "kernels": False,
}


def packed(fmt: Format) -> CompressedLinear:
    """A linear with random fields, computing in float32."""
    values = random_packed(fmt, ROWS, COLS, 0)
    shared = None
    if field := fmt.shared_field:
        shared = (SharedCodebooks({"key": field}), "key")
        shared[0]["key"].copy_(torch.from_numpy(values.pop(field.name)))
    module = pack_linear(nn.Linear(COLS, ROWS), fmt, "load", torch.float32, shared)
    module.write((name, torch.from_numpy(raw)) for name, raw in values.items())
    if fmt.low_rank:  # at random it would hide the codes
        module.write([("left_scales", packed_bytes(torch.full((fmt.low_rank.rank,), 2.0**-22).half()))])
    return module


def scale_of(module: CompressedLinear, x: torch.Tensor) -> float:
    """What no product is larger than."""
    return float(x.norm(dim=-1).max()) * float(module.dense().norm())


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_from_the_stored_weight_and_ends_in_it(name: str) -> None:
    fmt = Format.parse(name)
    module, x = packed(fmt), torch.randn(5, COLS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, size = module(x), scale_of(module, x)
    book = train_codebook(module)
    assert (module(x).detach() - before).abs().max() <= 64 * 2.0**-23 * size
    with torch.no_grad():
        book.shift.add_(torch.linspace(-0.3, 0.3, book.shift.numel()).view_as(book.shift))
        during = module(x)
    assert (during - before).abs().max() > 64 * 2.0**-23 * size
    write_back_codebook(module)
    assert not module.in_training and module.format == fmt
    with torch.no_grad():
        if fmt.shared_field:  # its holder writes it
            assert (module(x) - before).abs().max() <= 64 * 2.0**-23 * size
            return
        # a value is within 2^-11 of itself in fp16, and there are up to two of them in a weight
        assert (module(x) - during).abs().max() <= 2.0**-9 * scale_of(module, x)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """The output is linear in every value, so that a difference over a whole step is exact but for rounding."""
    module, x = packed(Format.parse(name)), torch.randn(3, COLS, generator=torch.Generator().manual_seed(2))
    book, weights = train_codebook(module), torch.randn(3, ROWS, generator=torch.Generator().manual_seed(3))
    (module(x) * weights).sum().backward()
    assert book.shift.grad is not None
    shift, gradient = book.shift.detach().view(-1), book.shift.grad.view(-1)
    size = float(weights.norm() * x.norm() * module.dense().norm())
    with torch.no_grad():
        base = module(x).double()
        for at in range(0, len(shift), max(1, len(shift) // 40)):
            shift[at] += 1
            step = float(((module(x).double() - base) * weights).sum())
            shift[at] -= 1
            assert abs(step - float(gradient[at])) <= 256 * 2.0**-23 * size


def test_scales_are_trained_beside_them() -> None:
    module, x = packed(Format.parse("aq2x4-d4")), torch.randn(3, COLS, generator=torch.Generator().manual_seed(4))
    gain, book = train_scales(module), train_codebook(module)
    module(x).square().sum().backward()
    assert gain.grad is not None and gain.grad.norm() > 0 and book.shift.grad is not None and book.shift.grad.norm() > 0
    with torch.no_grad():
        gain.mul_(1.5)
        book.shift.add_(0.25)
        during = module(x)
    write_back_scales(module)
    write_back_codebook(module)
    with torch.no_grad():
        assert (module(x) - during).abs().max() <= 2.0**-8 * scale_of(module, x)


@pytest.mark.parametrize("name", ["int4-g16", "tq2-l8+rot", "e8p2"])
def test_what_has_no_codebook_says_so(name: str) -> None:
    module = packed(Format.parse(name))
    assert not has_codebook(module)
    with pytest.raises(ValueError, match="no codebook that can be trained"):
        train_codebook(module)


def test_a_value_beyond_fp16_is_not_written() -> None:
    module = packed(Format.parse("km3"))
    fields = {name: raw.clone() for name, raw in module.fields.items()}
    with torch.no_grad():
        train_codebook(module).shift.fill_(1e9)
    with pytest.raises(ValueError, match="not finite in fp16"):
        write_back_codebook(module)
    revert(module, module.format, fields)
    assert not module.in_training and set(module.state_dict()) == {*fields, "bias"}


@pytest.mark.parametrize("fmt", ["aq1x4-d4", "aq1x4-d4-shared", "km2"])
def test_codebooks_come_nearer_for_no_byte(fmt: str, text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, linears(fmt))
    tuned = finetune(artifact, text=text, output=tmp_path / "tuned", **RUN)
    assert verify(tuned).deep
    old, new, before, after = read_plan(artifact), read_plan(tuned), read_tensors(artifact), read_tensors(tuned)
    assert (new.file_bytes, new.budget, new.shared) == (old.file_bytes, old.budget, old.shared)
    assert [choice.format for choice in new.choices] == [choice.format for choice in old.choices]
    changed = {n.rpartition(".")[2] for n in after if read_bytes(before[n]).tobytes() != read_bytes(after[n]).tobytes()}
    assert changed == {"levels" if fmt == "km2" else "codebooks"}
    assert kl(tuned, tmp_path / "model", text) < 0.95 * kl(artifact, tmp_path / "model", text)


def test_a_codebook_that_an_embedding_uses_too_stays(text: str, tmp_path: Path) -> None:
    def choose(matrix: Matrix) -> str | None:
        return "aq1x4-d4-shared" if matrix.kind in ("linear", "embedding") else None

    model, _ = load(pack("llama", tmp_path, choose), dtype=torch.float32)
    modules = trainable_linears(model)
    keys = {m.shared[1] for _, m in packed_modules(model) if m.shared is not None}
    with_embedding = {m.shared[1] for n, m in packed_modules(model) if m.shared is not None and n not in modules}
    assert with_embedding and keys
    books = TrainableCodebooks(model, modules)
    books.start()
    assert len(books.parameters()) == len(keys - with_embedding)
    ids = torch.arange(12)[None] % 50
    with torch.no_grad():
        before = model(ids).logits
        for shift in books.parameters():
            shift.add_(0.2)
        during = model(ids).logits
        books.write_back()
        after = model(ids).logits
        books.reset_shared()
        again = model(ids).logits
    assert not torch.allclose(before, during)
    # values of fp16 behind a few layers, logits of about one
    torch.testing.assert_close(after, during, rtol=0, atol=2.0**-6)
    torch.testing.assert_close(again, before, rtol=0, atol=1e-5)


def test_nothing_of_that_is_an_error(text: str, tmp_path: Path) -> None:
    artifact = pack("llama", tmp_path, linears("int4-g16"))
    with pytest.raises(UserError, match="--train codebooks: the artifact has none of these parts"):
        finetune(artifact, text=text, output=tmp_path / "tuned", **RUN)
    assert not (tmp_path / "tuned.partial").exists()
