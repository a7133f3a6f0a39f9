"""Calibration of a vision-language model on texts with images, against plain autograd on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import save_image_texts, save_tiny_llava

from reallm.calibration.calibrate import calibrate
from reallm.calibration.statistics import statistics_path
from reallm.errors import UserError
from reallm.models.image_texts import read_image_texts
from reallm.models.loaded import LoadedModel, load_model

SEED = 3
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llava(tmp_path_factory.mktemp("llava"), torch.float32)
    save_image_texts(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


def windows_of(loaded: LoadedModel) -> torch.Tensor:
    return torch.randint(5, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def test_text_alone_leaves_the_vision_tower_unmeasured(loaded: LoadedModel, tmp_path: Path) -> None:
    report = calibrate(loaded, windows_of(loaded), tmp_path, seed=SEED)
    outside_text = {m.name for m in loaded.matrices if "vision_tower" in m.name or "projector" in m.name}
    assert set(report.kept) == outside_text and len(outside_text) > 12


def test_images_measure_all_that_runs(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    images = read_image_texts(folder / "pairs.jsonl", loaded)
    windows = windows_of(loaded)
    report = calibrate(loaded, windows, tmp_path, seed=SEED, images=images)
    assert not any("whole model" in note for note in report.notes)
    # The last block of the tower is not used: LLaVA takes the features of the one before it.
    assert set(report.kept) == {m.name for m in loaded.matrices if "vision_tower.encoder.layers.1" in m.name}
    hessian, gram = torch.zeros(32, 32).double(), torch.zeros(32, 32).double()
    generator = torch.Generator().manual_seed(SEED)
    model = loaded.model
    model.requires_grad_(False)
    tokens = windows.numel()
    for each in images.inputs:
        uses: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = model.get_submodule(VISION).register_forward_hook(lambda _m, a, o, uses=uses: uses.append((a[0], o)))
        pixels = each["pixel_values"].clone().requires_grad_()
        scores = model(**{**each, "pixel_values": pixels}).logits[0]
        handle.remove()
        ids = each["input_ids"][0]
        kept = scores[ids != model.config.image_token_id]
        labels = torch.multinomial(kept.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(kept, labels, reduction="sum")
        x, output = uses[0]
        g = torch.autograd.grad(loss, output)[0].reshape(-1, 32).double()
        x = x.detach().reshape(-1, 32).double()
        hessian += (x * g.square().mean(1, keepdim=True)).T @ x
        gram += (g * x.square().mean(1, keepdim=True)).T @ g
        tokens += len(ids)
    block = next(m.block for m in loaded.matrices if m.name == VISION)
    stored = load_file(statistics_path(tmp_path, block))
    largest = float((hessian / tokens).max())
    torch.testing.assert_close(stored[f"guided/{VISION}"].double(), hessian / tokens, rtol=0, atol=1e-4 * largest)
    error = (stored[f"gram/{VISION}"].double() - gram / tokens).abs().max()
    assert float(error) < 2.0**-7 * float((gram / tokens).abs().max())


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2 is not JSON"),
        ('{"image": "0.png"}', "line 2: expected"),
        ('{"image": "nothing.png", "text": "a"}', r"line 2: the image .*nothing\.png cannot be read"),
        ('{"image": [], "text": "a <image>"}', "line 2: the model's processor cannot encode this"),
    ],
)
def test_a_wrong_line_is_named(line: str, what: str, loaded: LoadedModel, folder: Path) -> None:
    path = folder / "wrong.jsonl"
    path.write_text((folder / "pairs.jsonl").read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=what):
        read_image_texts(path, loaded)
