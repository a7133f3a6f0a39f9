"""Block-wise training: its loss is the documented one, it lowers the divergence, resumes to the byte, and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from tuning import SEQLEN, StopError, files, kl, linears, pack

from reallm.artifacts.verify import read_tensors, verify
from reallm.calibration.block_streaming import BlockStreamer
from reallm.calibration.objective import Objective
from reallm.errors import UserError
from reallm.finetuning import blockwise
from reallm.finetuning.blockwise import BlockTrainer, BlockWindow, mean_weights
from reallm.finetuning.chat_windows import SampledWindows
from reallm.finetuning.run import finetune
from reallm.kernels.storage.atomic import canonical_json
from reallm.models.loaded import load_model
from reallm.planner.tables.plan import read_plan

pytestmark = pytest.mark.usefixtures("one_thread")
RUN: dict[str, Any] = {
    "stages": ("blocks",),
    "block_windows": 16,
    "block_epochs": 2,
    "steps": 8,
    "seqlen": SEQLEN,
    "rank": 0,
    "gain_learning_rate": 5e-3,
    "patience": 0,
    "train": ("scales", "norms"),
    "kernels": False,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack("llama", tmp_path_factory.mktemp("llama"), linears("int2-g16", "tq2-l8+ldl+rot"))


@pytest.fixture(scope="module")
def tuned(llama: Path, text: str) -> Callable[..., Path]:
    """The artifact that the stages given produce; each combination is trained once."""
    outputs: dict[tuple[str, ...], Path] = {}

    def output_of(*stages: str) -> Path:
        if stages not in outputs:
            path = llama.parent / f"tuned-{'-'.join(stages)}"
            outputs[stages] = finetune(llama, text=text, output=path, **RUN | {"stages": stages})
        return outputs[stages]

    return output_of


@pytest.fixture(scope="module")
def divergence_before(llama: Path, text: str) -> float:
    return kl(llama, llama.parent / "model", text)


def test_the_loss_is_the_second_order_divergence(tmp_path: Path) -> None:
    """Against the formula in float64, with G from gradients that autograd takes through the whole model."""
    loaded = load_model(save_tiny("llama", tmp_path / "model"), dtype=torch.float32)
    windows = torch.randint(0, 64, (3, SEQLEN), generator=torch.Generator().manual_seed(0))
    streamer = BlockStreamer(loaded, tmp_path / "states", Objective(loaded, windows, 7, masked=True))
    streamer.store_results()
    loaded.model.requires_grad_(False)
    moments = blockwise.output_moments(streamer, 7)
    generator, gradients = torch.Generator().manual_seed(7), []
    for window in windows:
        states: list[torch.Tensor] = []

        def keep(_m: Any, _a: Any, output: Any, states: list[torch.Tensor] = states) -> Any:
            states.append((output[0] if isinstance(output, tuple) else output).requires_grad_())

        with loaded.model.get_submodule(loaded.blocks[0]).register_forward_hook(keep):
            scores = loaded.model(input_ids=window[None]).logits[0]
        labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, states[0])[0][0])
    g = torch.cat(gradients).double()
    G = g.T @ g / len(g)
    G += blockwise.DAMPING * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
    torch.testing.assert_close(moments[0].double(), G, rtol=1e-4, atol=1e-7)
    dense, weights = streamer.results.read(0, 0)[0], torch.rand(SEQLEN)
    student = streamer.arguments(0, 0)[0][0] + 0.1
    first = loaded.model.get_submodule(loaded.blocks[0])
    block = BlockTrainer(streamer, 0, first, moments[0])
    loss = block.loss(BlockWindow(0, student, dense, weights / weights.sum()))
    d = (streamer.replay(0, 0, student, first) - dense)[0].double()
    expected = sum(0.5 * w * (e @ G @ e) for w, e in zip(weights.double() / weights.double().sum(), d, strict=True))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_training_the_blocks_lowers_the_divergence_at_the_same_size(
    llama: Path, tuned: Callable[..., Path], text: str, divergence_before: float
) -> None:
    output = tuned("blocks")
    assert verify(output).deep
    assert kl(output, llama.parent / "model", text) < 0.9 * divergence_before
    assert read_plan(output).file_bytes == read_plan(llama).file_bytes
    assert any("block by block for 2 x 16 windows each" in note for note in read_plan(output).notes)
    norms = {n for n in read_tensors(output) if "norm" in n}
    assert {n for n in norms if "layers" not in n}  # one norm is outside the blocks


@pytest.mark.parametrize("stages", [("blocks", "end-to-end"), ("end-to-end", "blocks")])
def test_both_stages_in_either_order(
    llama: Path, tuned: Callable[..., Path], text: str, divergence_before: float, stages: tuple[str, str]
) -> None:
    output = tuned(*stages)
    verify(output)
    assert kl(output, llama.parent / "model", text) < 0.9 * divergence_before
    note = next(note for note in read_plan(output).notes if "windows each" in note)
    first, second = (note.index(words) for words in ("block by block", "for 8 steps"))
    assert (first < second) == (stages[0] == "blocks")


@pytest.mark.parametrize("stages", [("blocks",), ("blocks", "end-to-end")])
def test_an_interrupted_run_continues_after_the_last_block(
    llama: Path,
    tuned: Callable[..., Path],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: tuple[str, ...],
) -> None:
    unbroken = files(tuned(*stages))
    run, train, calls = RUN | {"stages": stages}, BlockTrainer.train, [0]

    def counting(self: BlockTrainer, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise StopError
        train(self, *arguments)

    monkeypatch.setattr(BlockTrainer, "train", counting)
    with pytest.raises(StopError):
        finetune(llama, text=text, output=tmp_path / "tuned", **run)
    assert finetune(llama, text=text, output=tmp_path / "tuned", **run) == tmp_path / "tuned"
    assert calls[0] == 1 + 1 + len(load_model(llama.parent / "model").blocks) - 1  # one done, one cut off, the rest
    assert files(tmp_path / "tuned") == unbroken


def test_a_block_that_gets_worse_on_the_held_out_windows_is_put_back(llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is written"):
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN | {"gain_learning_rate": 0.99, "block_epochs": 1})
    assert not list(tmp_path.iterdir())


def test_factors_and_a_packed_embedding(text: str, tmp_path: Path) -> None:
    """The input of the first block comes from the compressed model's embedding."""
    artifact = pack("gemma2", tmp_path, lambda m: "int4-g16" if m.kind == "embedding" else "int2-g16")
    run = RUN | {"train": ("factors",), "rank": 2, "learning_rate": 3e-3}
    output = finetune(artifact, text=text, output=tmp_path / "tuned", **run)
    assert kl(output, tmp_path / "model", text) < kl(artifact, tmp_path / "model", text)


def test_tokens_after_the_last_answer_have_no_weight() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    scored = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    first, second = mean_weights(SampledWindows(tokens, torch.arange(2), scored))
    assert first.tolist() == [0.25] * 4 + [0.0] and second.tolist() == pytest.approx([0.2] * 5)


def test_conversations(llama: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "one " * 9}, {"role": "assistant", "content": "two " * 9}]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(canonical_json({"messages": talk}).replace("\n", " ") for _ in range(12)))
    output = finetune(llama, text=str(path), output=tmp_path / "tuned", **RUN)
    verify(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("layers",)}, "--stages layers: expected one or more of codes, blocks, end-to-end"),
        ({"stages": ()}, "--stages : expected one or more"),
        ({"stages": ("blocks", "blocks")}, "--stages blocks,blocks: expected"),
        ({"block_windows": 0}, "--block-windows 0: expected at least 1 window"),
        ({"loss": "text"}, "--stages blocks trains the model to match the dense model"),
    ],
)
def test_mistakes(llama: Path, text: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune(llama, text=text, output=tmp_path / "tuned", **RUN | change)
    assert not list(tmp_path.iterdir())
