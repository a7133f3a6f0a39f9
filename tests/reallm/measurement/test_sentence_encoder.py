"""A sentence encoder through measure, plan, compile and eval: the predicted loss is the measured 1 - cosine."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
from encoders import save_sentence_encoder

import reallm


def test_the_plan_predicts_the_cosine_that_eval_measures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_sentence_encoder(tmp_path / "model", seed=2)
    words = [f"{a}{b}" for a in "bcdfgklmn" for b in ("ab", "er", "ion", "or")]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(words, k=3000)))
    (tmp_path / "space.yaml").write_text("linear: [int2-g16, int4-g16]\nembedding: [int4-g16]\n")
    with caplog.at_level(logging.WARNING):
        table = reallm.measure(
            model, text=text, output=tmp_path / "work", space=tmp_path / "space.yaml", nsamples=60, seqlen=24, jobs=1
        )
    assert "1 - cosine" in caplog.text and "few texts" in caplog.text
    assert "calibration_perplexity" not in table.base, "there is no likelihood of the text"
    plan = reallm.plan(tmp_path / "work", budget="4.2bpw", output=tmp_path / "plan.json", pins=["word_embed=int4-g16"])
    kept = {choice.matrix for choice in plan.choices if choice.format == "f32"}
    assert kept <= {"pooler.dense"}, "the embedding does not depend on the pooler, everything else is compressed"
    out = reallm.compile(tmp_path / "plan.json", tmp_path / "out")
    result = reallm.evaluate(out, against=model, text=str(text), seqlen=24, windows=60, progress=False)
    assert result.comparison.perplexity is None and result.comparison.divergence is None
    assert result.comparison.cosine is not None
    # The second-order prediction on the calibration text itself; errors of 2 bits are not small, hence a factor of 1.5.
    assert 1 / 1.5 < (1 - result.comparison.cosine) / plan.predicted_loss < 1.5
