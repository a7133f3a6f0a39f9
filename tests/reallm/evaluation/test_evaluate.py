"""Evaluation of models on disk: protocol, sizes and errors."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import VOCAB, save_tiny, tiny_model, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from reallm.cli.tables import print_evaluation
from reallm.errors import UserError
from reallm.evaluation.evaluate import evaluate
from reallm.models.sizes import COUNTED_KINDS

SEQLEN = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 letters and spaces, which are 300 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "test.txt"
    path.write_text("".join(random.Random(0).choices("abcdefgh ", k=300)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


def test_windows_do_not_overlap_and_the_last_partial_one_is_dropped(llama: Path, text: str) -> None:
    result = evaluate(llama, text=text, seqlen=SEQLEN, progress=False)
    assert result.comparison.windows == 300 // SEQLEN
    assert result.comparison.tokens == 300 // SEQLEN * (SEQLEN - 1)
    assert evaluate(llama, text=text, seqlen=SEQLEN, windows=2, progress=False).comparison.windows == 2


def test_perplexity_is_that_of_the_model_itself(llama: Path, text: str) -> None:
    result = evaluate(llama, text=text, seqlen=SEQLEN, windows=3, progress=False)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    letters = sorted(set(Path(text).read_text()))
    ids = torch.tensor([_token_of(letter) for letter in Path(text).read_text()[: 3 * SEQLEN]]).view(3, SEQLEN)
    assert letters[0] == " "
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    assert math.log(result.comparison.perplexity) == pytest.approx(
        loss, abs=1e-5
    )  # float32 sums in two different orders


def _token_of(letter: str) -> int:
    """Id in the tiny vocabulary: five special tokens, then the 256 byte characters in order; a space is U+0120."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return 5 + alphabet.index("\u0120" if letter == " " else letter)


def test_a_model_does_not_diverge_from_itself_and_the_report_is_json(llama: Path, text: str) -> None:
    result = evaluate(llama, against=llama, text=text, seqlen=SEQLEN, progress=False)
    assert result.comparison.divergence is not None
    assert result.comparison.divergence.mean == 0
    report = json.loads(result.to_json())
    assert report["comparison"]["divergence"]["same_top1"] == 1
    assert report["sizes"] == report["base_sizes"]
    assert report["text"] == text
    assert report["peak_rss_bytes"] > 1 << 20


def test_a_changed_model_diverges(llama: Path, text: str, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path, seed=1)
    result = evaluate(other, against=llama, text=text, seqlen=SEQLEN, progress=False)
    assert result.comparison.divergence is not None
    assert result.comparison.divergence.mean > 0.01
    assert result.comparison.base_perplexity != result.comparison.perplexity


def test_sizes_count_every_byte_once(llama: Path, text: str) -> None:
    sizes = evaluate(llama, text=text, seqlen=SEQLEN, windows=1, progress=False).sizes
    tensors = load_file(llama / "model.safetensors")
    linears = [t for name, t in tensors.items() if t.ndim == 2 and "layers" in name]
    assert sizes.matrices_weights == sum(t.numel() for t in linears)
    assert sizes.weights == sum(t.numel() for t in tensors.values())
    assert sizes.weights_bytes == sum(t.nbytes for t in tensors.values())
    assert sizes.file_bytes == (llama / "model.safetensors").stat().st_size
    assert sizes.matrices_bpw == sizes.weights_bpw == 16
    assert COUNTED_KINDS == ("linear", "expert")


def test_tied_weights_count_once(tmp_path: Path, text: str) -> None:
    folder = save_tiny("llama-tied", tmp_path)
    sizes = evaluate(folder, text=text, seqlen=SEQLEN, windows=1, progress=False).sizes
    assert sizes.weights == sum(p.numel() for p in tiny_model("llama-tied").parameters())
    assert sizes.weights_bpw == 32


def test_an_encoder_is_evaluated_on_masked_tokens_with_a_note(tmp_path: Path, text: str) -> None:
    folder = save_tiny("roberta", tmp_path)
    result = evaluate(folder, text=text, seqlen=SEQLEN, windows=2, progress=False)
    assert result.comparison.tokens == 2 * round(0.15 * SEQLEN)
    assert any("masked" in note for note in result.notes)


def test_a_context_longer_than_the_encoder_supports_is_refused(tmp_path: Path, text: str) -> None:
    folder = save_tiny("roberta", tmp_path)
    with pytest.raises(UserError, match="takes 1 to 256 tokens"):
        evaluate(folder, text=text, seqlen=257, progress=False)


def test_a_note_says_that_the_offline_text_is_not_a_benchmark(llama: Path) -> None:
    result = evaluate(llama, seqlen=SEQLEN, windows=1, progress=False)
    assert any("give --text" in note for note in result.notes)


def test_unusable_options_are_refused_in_one_line(llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dtype int7: expected float32"):
        evaluate(llama, text=text, dtype="int7")
    with pytest.raises(UserError, match=r"--seqlen 2 .*expected at least 8"):
        evaluate(llama, text=text, seqlen=2)
    with pytest.raises(UserError, match=r"--windows 0"):
        evaluate(llama, text=text, seqlen=SEQLEN, windows=0)
    with pytest.raises(UserError, match=r"--seqlen 100000"):
        evaluate(llama, text=text, seqlen=100_000)
    with pytest.raises(UserError, match=r"tokens found, 200 needed"):
        (tmp_path / "ten.txt").write_text("ten words of text are far too few to measure\n")
        evaluate(llama, text=str(tmp_path / "ten.txt"), seqlen=200)
    with pytest.raises(UserError, match=r"--device cuda:77 cannot be used here|--device nowhere"):
        evaluate(llama, text=text, seqlen=SEQLEN, device="cuda:77")


def test_infinite_activations_are_an_error(tmp_path: Path, text: str) -> None:
    """The weights are finite, as `load_model` checks, but their product is not."""
    folder = save_tiny("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"window 1 of the evaluated model: the logits hold NaN or infinity"):
        evaluate(folder, text=text, seqlen=SEQLEN, progress=False)


def test_an_encoder_is_compared_by_masked_divergence_and_by_the_cosine_of_its_embeddings(
    tmp_path: Path, text: str
) -> None:
    first, second = (save_tiny("roberta", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    same = evaluate(first, against=first, text=text, seqlen=SEQLEN, windows=2, progress=False).comparison
    assert same.divergence is not None and same.divergence.mean == 0
    assert same.cosine == pytest.approx(1, abs=1e-6)
    other = evaluate(second, against=first, text=text, seqlen=SEQLEN, windows=2, progress=False)
    assert other.comparison.cosine is not None and other.comparison.cosine < 0.99
    console = Console(record=True, width=200, file=io.StringIO())
    print_evaluation(other, console)
    assert f"{other.comparison.cosine:.6f}" in console.export_text()
    assert evaluate(first, text=text, seqlen=SEQLEN, windows=2, progress=False).comparison.cosine is None


def test_a_language_model_has_no_cosine(llama: Path, text: str) -> None:
    assert evaluate(llama, against=llama, text=text, seqlen=SEQLEN, progress=False).comparison.cosine is None


def test_fewer_windows_than_asked_for_are_noted(llama: Path, text: str) -> None:
    result = evaluate(llama, text=text, seqlen=SEQLEN, windows=50, progress=False)
    assert any("has only 9 windows of 32 tokens, not 50" in note for note in result.notes)
    for count in (2, 9, None):
        enough = evaluate(llama, text=text, seqlen=SEQLEN, windows=count, progress=False)
        assert not any("has only" in note for note in enough.notes)


def test_tokens_that_the_model_or_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    larger = tiny_model("llama")
    larger.resize_token_embeddings(VOCAB + 1)
    larger.save_pretrained(tmp_path / "larger")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    for each in (folder, tmp_path / "larger"):
        tokenizer.save_pretrained(each)
    (tmp_path / "new.txt").write_text("abcdefgh<new>" * 20)
    source = str(tmp_path / "new.txt")
    for path, against in ((folder, None), (tmp_path / "larger", folder)):
        with pytest.raises(UserError, match=rf"new.txt: .* the token id {VOCAB} .*the model has only {VOCAB} tokens"):
            evaluate(path, against=against, text=source, seqlen=SEQLEN, progress=False)
    assert evaluate(tmp_path / "larger", text=source, seqlen=SEQLEN, progress=False).comparison.windows == 5


def test_a_vocabulary_padded_beyond_the_tokenizer_is_scored_in_full(tmp_path: Path, text: str) -> None:
    padded = tiny_model("llama")
    padded.resize_token_embeddings(VOCAB + 27)
    padded.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    result = evaluate(tmp_path, against=tmp_path, text=text, seqlen=SEQLEN, windows=1, progress=False).comparison
    ids = torch.tensor([_token_of(letter) for letter in Path(text).read_text()[:SEQLEN]])[None]
    with torch.inference_mode():
        loss = float(padded(ids, labels=ids).loss)
    assert result.perplexity is not None and result.divergence is not None
    assert math.log(result.perplexity) == pytest.approx(loss, abs=1e-5)
    assert result.divergence.mean == 0


def test_models_that_do_not_belong_together_are_refused(llama: Path, tmp_path: Path, text: str) -> None:
    encoder = save_tiny("roberta", tmp_path / "encoder")
    with pytest.raises(UserError, match=r"predicts masked tokens, but .* predicts the next token; --against must name"):
        evaluate(encoder, against=llama, text=text, seqlen=SEQLEN, progress=False)
    shorter = tiny_model("llama", settings={"max_position_embeddings": 64})
    shorter.save_pretrained(tmp_path / "shorter")
    tiny_tokenizer().save_pretrained(tmp_path / "shorter")
    with pytest.raises(UserError, match="--seqlen 100: this model takes 1 to 64 tokens"):
        evaluate(llama, against=tmp_path / "shorter", text=text, seqlen=100, progress=False)
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "shorter")
    with pytest.raises(UserError, match="have different vocabularies"):
        evaluate(llama, against=tmp_path / "shorter", text=text, seqlen=SEQLEN, progress=False)


def test_a_lone_surrogate_names_its_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\udc00"}\n')
    with pytest.raises(UserError, match=r"a.jsonl line 2: character 1 is half of a UTF-16 surrogate pair"):
        evaluate(llama, text=str(tmp_path / "a.jsonl"), seqlen=SEQLEN, progress=False)


def test_a_model_without_an_output_layer_has_only_the_cosine(tmp_path: Path, text: str) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
        )
        BertModel(config).save_pretrained(tmp_path / str(seed))
        tiny_tokenizer().save_pretrained(tmp_path / str(seed))
    result = evaluate(tmp_path / "1", against=tmp_path / "0", text=text, seqlen=SEQLEN, windows=2, progress=False)
    assert result.comparison.perplexity is None and result.comparison.divergence is None
    models = [AutoModel.from_pretrained(tmp_path / str(seed)).eval() for seed in (0, 1)]
    ids = torch.tensor([_token_of(letter) for letter in Path(text).read_text()[: 2 * SEQLEN]]).view(2, SEQLEN)
    with torch.inference_mode():
        means = [model(ids).last_hidden_state.mean(1) for model in models]
    assert result.comparison.cosine == pytest.approx(float(torch.cosine_similarity(*means).mean()), abs=1e-6)
    console = Console(record=True, width=200, file=io.StringIO())
    print_evaluation(result, console)
    shown = console.export_text()
    assert "cosine to the original" in shown and "perplexity" not in shown and "scored" not in shown


def test_a_model_that_also_takes_images_is_evaluated_on_text_alone(tmp_path: Path, text: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = tiny_model("llama")
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = LlavaConfig(text_config=language.config, vision_config=vision, image_token_index=4)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    result = evaluate(tmp_path, against=tmp_path, text=text, seqlen=SEQLEN, windows=1, progress=False)
    assert result.comparison.divergence is not None and result.comparison.divergence.mean == 0
    assert any("evaluated on text alone" in note for note in result.notes)
