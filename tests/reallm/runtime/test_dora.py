"""DoRA: gradients with the norm held constant, the gain through every path of a product, adapters written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import make
from compilers import needs_compiler
from safetensors.torch import load_file, save_file
from strategies import random_packed
from torch import Tensor, nn
from typer.testing import CliRunner

from reallm.artifacts.adapter_layout import CONFIG_FILE, MAGNITUDE, PREFIX, WEIGHTS_FILE
from reallm.artifacts.peft_files import read_adapter, write_adapter
from reallm.cli.main import app
from reallm.errors import UserError
from reallm.finetuning.distillation import DistillationTrainer
from reallm.finetuning.run import finetune
from reallm.kernels.formats.formats import Format
from reallm.kernels.reference import decode_reference
from reallm.models.loaded import Matrix
from reallm.runtime import modules
from reallm.runtime.convert import pack_linear
from reallm.runtime.generate import generate
from reallm.runtime.load import load
from reallm.runtime.modules import CompressedLinear
from reallm.runtime.row_magnitudes import magnitudes
from reallm.runtime.step.cpu import compile_step
from reallm.runtime.training.finish import revert, write_back_low_rank
from reallm.runtime.training.start import train_low_rank, train_magnitude, train_scales

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLS, RANK = 24, 40, 3
FORMATS = ("tq2.5-l9+ldl2+rot", "int4-g16", "lm3-g16+r2i8", "tq2-l8+rot+perm+cs+r3", "uint3-g0+cs", "nf4-g8+perm+o5")
IDS = torch.arange(20)[None]
PROMPT = "abcdefgh"
ULP = 2.0**-23


def packed(name: str, seed: int = 0) -> tuple[CompressedLinear, Tensor]:
    """A linear with random fields that computes in float32, and its weight in float64."""
    fmt = Format.parse(name)
    module = pack_linear(nn.Linear(COLS, ROWS, bias=True), fmt, "load", torch.float32, None)
    fields = random_packed(fmt, ROWS, COLS, seed)
    module.write((n, torch.from_numpy(raw)) for n, raw in fields.items())
    return module, torch.from_numpy(decode_reference(fmt, fields, ROWS, COLS)).double()


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(name: str) -> tuple[CompressedLinear, list[nn.Parameter], Tensor]:
    """A module in training whose m, L and R are no longer at their start, and its weight without L R in float64."""
    module, weight = packed(name)
    stored = module.format.low_rank.rank if module.format.low_rank else 0
    if stored:
        left, right = train_low_rank(module)
        weight -= left.detach().double() @ right.detach().double()
        revert(module, module.format, module.fields)
    left, right = train_low_rank(module, stored + RANK)
    magnitude = train_magnitude(module)
    with torch.no_grad():
        size = float(weight.norm(dim=1).mean())
        left.add_(0.3 * size * numbers(*left.shape, seed=1) / left.shape[1])
        magnitude.mul_(torch.linspace(0.5, 1.5, ROWS))
    return module, [magnitude, left, right], weight


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_from_the_stored_weight(name: str) -> None:
    module, weight = packed(name)
    x = numbers(5, COLS, seed=2)
    before = module(x).detach()
    train_low_rank(module, 8)
    magnitude = train_magnitude(module)
    # norms of 40 squares, and products of 40 terms with |w| |x| in all: both in float32
    torch.testing.assert_close(magnitude.detach().double(), weight.norm(dim=1), rtol=64 * ULP, atol=0)
    bound = 128 * ULP * float(weight.norm(dim=1).max() * x.norm(dim=1).max())
    torch.testing.assert_close(module(x).detach(), before, rtol=0, atol=bound)


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_finite_differences_with_the_norm_held_constant(name: str) -> None:
    """With the norm fixed the loss is linear in every single number of m, L and R, so a whole step is exact."""
    module, parameters, weight = started(name)
    x, wanted = numbers(3, COLS, seed=3), numbers(3, ROWS, seed=4)
    (module(x) * wanted).sum().backward()
    values = [parameter.detach().double() for parameter in parameters]
    norms = (weight + values[1] @ values[2]).norm(dim=1)

    def loss(m: Tensor, left: Tensor, right: Tensor) -> float:
        outputs = m / norms * (x.double() @ (weight + left @ right).T) + module.bias.detach().double()
        return float((outputs * wanted.double()).sum())

    base = loss(*values)
    for index, parameter in enumerate(parameters):
        assert parameter.grad is not None
        size = float(parameter.grad.abs().max())
        for at in range(0, parameter.numel(), max(1, parameter.numel() // 9)):
            moved = [value.clone() for value in values]
            moved[index].view(-1)[at] += 1
            exact, found = loss(*moved) - base, float(parameter.grad.view(-1)[at])
            # float32 sums of fewer than 200 terms, which cancel to no less than a thousandth of the largest
            assert abs(found - exact) <= 256 * ULP * max(size, abs(exact)) + 1e-9 * abs(base), (index, at)


@pytest.mark.parametrize("name", FORMATS)
def test_the_norm_follows_the_factors_and_folding_keeps_the_product(name: str) -> None:
    module, (magnitude, left, right), weight = started(name)
    x = numbers(4, COLS, seed=5)
    direction = weight + left.detach().double() @ right.detach().double()
    whole = (magnitude.detach().double() / direction.norm(dim=1))[:, None] * direction
    exact = x.double() @ whole.T + module.bias.detach().double()
    bound = 256 * ULP * float(whole.norm(dim=1).max() * x.norm(dim=1).max())
    with torch.no_grad():
        assert float((module(x).double() - exact).abs().max()) <= bound
        wanted = magnitude.detach().clone()
        write_back_low_rank(module, "f16")
        assert not module.in_training
        # the rows' norms are m whatever fp16 has made of the factors; their directions move by 2^-11 of L R
        torch.testing.assert_close(module.weight.norm(dim=1), wanted, rtol=64 * ULP, atol=0)
        torch.testing.assert_close(magnitudes(module), wanted, rtol=64 * ULP, atol=0)
        moved = float((module(x).double() - exact).abs().max())
        assert moved <= bound + 8 * 2.0**-11 * float(whole.norm(dim=1).max() * x.norm(dim=1).max())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_the_gain_is_in_every_path_of_a_product(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, weight = packed(name)
    gain = torch.linspace(-0.5, 2, ROWS)
    plain = module.weight.clone()
    module.set_gain(gain)
    x = numbers(rows, COLS, seed=6)
    exact = x.double() @ (gain.double()[:, None] * weight).T + module.bias.detach().double()
    # float32 sums of 100 terms; a single row of x may be rounded to 16 bits first
    size = float((gain[:, None] * plain).norm(dim=1).max() * x.norm(dim=1).max())
    bound = (256 * ULP + 2.0**-14) * max(size, float(plain.norm() * x.norm(dim=1).max()))
    with torch.no_grad():
        natively = module(x)
        monkeypatch.setattr(modules, "can_multiply", lambda inputs: False)
        portably = module(x)
    for found in (natively, portably, module(x.clone().requires_grad_()).detach()):
        assert float((found.double() - exact).abs().max()) <= bound
    torch.testing.assert_close(module.weight, gain[:, None] * plain, rtol=ULP, atol=0)
    module.half()
    assert module.gain is not None and module.gain.dtype == torch.float32
    torch.testing.assert_close(module.gain, gain, rtol=0, atol=0)
    module.set_gain(None)
    assert module.gain is None and torch.equal(module.float().weight, plain)


def test_a_row_of_zeros_stays_zero() -> None:
    module, _ = packed("int4-g16")
    scales = module.fields["scales"].clone()
    scales[: 2 * -(-COLS // 16)] = 0  # of the first row
    module.write([("scales", scales)])
    train_low_rank(module, 2)
    magnitude = train_magnitude(module)
    with torch.no_grad():
        module.bias.zero_()
    output = module(numbers(2, COLS, seed=7))
    output.sum().backward()
    assert float(magnitude.detach()[0]) == 0 and not bool(output[:, 0].any())
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    write_back_low_rank(module, "f16")
    assert not bool(module.weight[0].any()) and bool(module.weight.isfinite().all())


def test_a_magnitude_is_trained_beside_factors_alone() -> None:
    module, _ = packed("int4-g16")
    with pytest.raises(ValueError, match=r"call train_low_rank\(\) first"):
        train_magnitude(module)
    train_low_rank(module, 2)
    train_scales(module)
    with pytest.raises(ValueError, match="only with low-rank factors"):
        train_magnitude(module)


def choose(matrix: Matrix) -> str | None:
    """Formats with and without a rotation and factors of their own; none for the head."""
    formats = {"q": "int4-g16", "v": "uint4-g16+cs", "o": "nf3-g16+r2", "gate": "tq3-l8+rot", "down": "int3-g16+r1"}
    family = matrix.name.rpartition(".")[2].removesuffix("_proj")
    return formats.get(family, "tq3-l8+rot+r2") if matrix.kind == "linear" else None


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen2", tmp_path_factory.mktemp("dora"), choose).folder  # which has biases


def draw(artifact: Path, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A DoRA adapter of every linear, the head included, and the weights it stands for."""
    model, _ = load(artifact, dtype=torch.float32)
    factors, magnitudes, weights = {}, {}, {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear):
            base = module.weight.detach().clone()
            left, right = numbers(base.shape[0], RANK, seed=seed), numbers(RANK, base.shape[1], seed=seed + 1000)
            factors[name] = left, right = (0.05 * left).half().float(), (0.3 * right).half().float()
            direction = base + left @ right
            magnitudes[name] = direction.norm(dim=1) * (0.5 + torch.rand(len(base), generator=torch.manual_seed(seed)))
            weights[name] = (magnitudes[name] / direction.norm(dim=1))[:, None] * direction
    return write_adapter(folder, factors, artifact, magnitudes=magnitudes), weights


@torch.no_grad()
def logits(artifact: Path, adapter: Path | None) -> Tensor:
    model, _ = load(artifact, dtype=torch.float32, adapter=adapter)
    result: Tensor = model(input_ids=IDS).logits
    return result


@torch.no_grad()
def expected(artifact: Path, weights: dict[str, Tensor]) -> Tensor:
    """Logits with `weights` in place of the modules' own."""
    model, _ = load(artifact, dtype=torch.float32)
    for name, weight in weights.items():
        own = model.get_submodule(name)
        linear = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
        linear.weight.copy_(weight)
        if own.bias is not None:
            linear.bias.copy_(own.bias)
        model.set_submodule(name, linear)
    result: Tensor = model(input_ids=IDS).logits
    return result


def test_an_attached_adapter_gives_the_weights_it_stands_for(artifact: Path, tmp_path: Path) -> None:
    folder, weights = draw(artifact, tmp_path / "a")
    assert json.loads((folder / CONFIG_FILE).read_text())["use_dora"] is True
    tensors = load_file(folder / WEIGHTS_FILE)
    assert {n for n in tensors if n.endswith(MAGNITUDE)} == {f"{PREFIX}{name}{MAGNITUDE}" for name in weights}
    wanted = expected(artifact, weights)
    # all factors are numbers of fp16, so that attaching rounds none; sums of up to 80 terms in two layers of 7 products
    torch.testing.assert_close(logits(artifact, folder), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert float((logits(artifact, None) - wanted).abs().max()) > 0.1 * float(wanted.abs().max())
    model, _ = load(artifact, dtype=torch.float32, adapter=folder)
    for name, weight in weights.items():
        found = model.get_submodule(name).weight.detach()
        torch.testing.assert_close(found.norm(dim=1), weight.norm(dim=1), rtol=64 * ULP, atol=0)


@needs_compiler
def test_the_compiled_step_takes_the_gain(artifact: Path, tmp_path: Path) -> None:
    folder, _ = draw(artifact, tmp_path / "a")
    model, _ = load(artifact, dtype=torch.float32, adapter=folder)
    step = compile_step(model)
    step.reserve(IDS.numel())
    wanted = logits(artifact, folder)[0]
    found = [step.run(IDS[0, :12])] + [step.run(IDS[0, i : i + 1]) for i in range(12, IDS.numel())]
    # one row of x is rounded to 16 bits here, many are not
    torch.testing.assert_close(torch.stack(found), wanted[11:], rtol=0, atol=2.0**-10 * float(wanted.abs().max()))
    packed_module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(packed_module, CompressedLinear) and not step.outdated()
    packed_module.set_gain(None)
    assert step.outdated()


def test_other_magnitudes_are_refused(artifact: Path, tmp_path: Path) -> None:
    folder, weights = draw(artifact, tmp_path / "a")
    config, tensors = json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)
    name = f"{PREFIX}{next(iter(weights))}{MAGNITUDE}"
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        ({"use_dora": False}, tensors, r"holds '.*lora_magnitude_vector'; expected lora_A and lora_B"),
        ({}, {n: t for n, t in tensors.items() if n != name}, r"has no lora_magnitude_vector \[\d+\]"),
        ({}, tensors | {name: tensors[name][:-1]}, r"has no lora_magnitude_vector \[\d+\]"),
        ({}, tensors | {name: tensors[name] * torch.inf}, "holds NaN or infinity"),
        ({}, tensors | {name: tensors[name].to(torch.int32)}, "does not hold floats of 16 or 32 bits"),
    ]
    for changes, held, message in cases:
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
        save_file(held, folder / WEIGHTS_FILE)
        with pytest.raises(UserError, match=message):
            read_adapter(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("abcdefgh ." * 60)
    return str(path)


RUN = {"rank": 2, "steps": 10, "seqlen": 32, "learning_rate": 1e-2, "adapter": True, "dora": True, "patience": 0}


@pytest.fixture(scope="module")
def trained(artifact: Path, text: str) -> Path:
    return finetune(artifact, text=text, output=artifact.parent / "lora", **RUN)


def test_magnitudes_are_trained(artifact: Path, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = read_adapter(trained)
    model, _ = load(artifact, dtype=torch.float32)
    for name, (left, right) in adapter.factors.items():
        norms = (model.get_submodule(name).weight + left @ right).norm(dim=1)
        assert 1e-3 < float((adapter.magnitudes[name] / norms - 1).abs().max()) < 0.5, name


def test_an_interrupted_run_ends_in_the_same_bytes(
    artifact: Path, trained: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, left = DistillationTrainer.compute_loss, [5]

    def stopping(self: DistillationTrainer, model: nn.Module, *arguments: Any, **options: Any) -> Any:
        left[0] -= model.training
        if left[0] < 0:
            raise KeyboardInterrupt
        return compute(self, model, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "compute_loss", stopping)
        finetune(artifact, text=text, output=tmp_path / "lora", **RUN)
    again = finetune(artifact, text=text, output=tmp_path / "lora", **RUN)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_magnitudes_are_for_adapters_alone(artifact: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dora: row magnitudes can be stored in adapters only; add --adapter"):
        finetune(artifact, text=text, output=tmp_path / "a", **RUN | {"adapter": False})


def test_the_commands_train_and_run_it(artifact: Path, trained: Path, text: str, tmp_path: Path) -> None:
    options = ["--text", text, "-o", str(tmp_path / "lora"), "--adapter", "--dora"]
    for name in ("steps", "seqlen", "rank", "learning_rate", "patience"):
        options += [f"--{name.replace('_', '-')}", str(RUN[name])]
    done = CliRunner().invoke(app, ["finetune", str(artifact), *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "lora" / WEIGHTS_FILE).read_bytes() == (trained / WEIGHTS_FILE).read_bytes()
    folder, _ = draw(artifact, tmp_path / "drawn")
    run = ["generate", str(artifact), PROMPT, "--max-new-tokens", "12"]
    plain, adapted = (CliRunner().invoke(app, [*run, *extra]) for extra in ([], ["--adapter", str(folder)]))
    assert (plain.exit_code, adapted.exit_code) == (0, 0), adapted.output
    assert "decoding loop" not in adapted.stderr
    assert adapted.stdout == generate(artifact, PROMPT, max_new_tokens=12, adapter=folder) + "\n" != plain.stdout
    refused = CliRunner().invoke(app, [*run, "--adapter", str(tmp_path)])
    assert refused.exit_code == 2 and f"reallm: {tmp_path} is not an adapter" in refused.stderr
