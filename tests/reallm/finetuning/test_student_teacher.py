"""The student computes in the dtype of the teacher, whatever dtype the dense model is stored in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tuning import SEQLEN, linears, pack

from reallm.finetuning import student_teacher
from reallm.finetuning.processes import SINGLE_PROCESS
from reallm.finetuning.resolved_settings import ResolvedSettings
from reallm.planner.tables.plan import read_plan
from reallm.text.corpus import load_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_student_computes_in_the_teachers_dtype(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student_teacher, "compute_dtype", lambda *_: torch.bfloat16)
    artifact, settings = pack("llama", tmp_path, linears("int2-g16")), ResolvedSettings(seqlen=SEQLEN)
    data = student_teacher.open_training_data(artifact, read_plan(artifact), load_text(text), settings, SINGLE_PROCESS)
    pair = student_teacher.open_student(artifact, data, settings)
    assert pair.dense.dtype == torch.float32  # as it is stored
    assert pair.student.dtype == data.teacher.dtype == torch.bfloat16
