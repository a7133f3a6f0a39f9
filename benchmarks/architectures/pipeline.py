"""All stages of reallm on the tiny model of one case, with results compared with references computed without reallm."""

from __future__ import annotations

import copy
import re
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import reallm
from reallm.errors import ReallmError
from reallm.models.loaded import load_model
from reallm.planner.tables.plan import Plan

from .build import round_weights, runs_in, save_model, text_forward, tiny_model
from .cases import Case
from .outcome import Outcome
from .picture import with_picture
from .reference import check_plan, other_sizes, packed_choices, replaced_model

SPACE = "linear: [int4-g16, int8-g16, tq3-l8+ldl2+rot]\nembedding: [int4-g16, int8-g16]\n"
TEXT = "The quick brown fox jumps over the lazy dog, and 13 more animals watch it (quietly). " * 12
SEQLEN, WINDOWS = 32, 3
PROMPT, NEW_TOKENS = "The quick", 6
MAX_ERROR = 1e-4
"""Largest difference of the logits of two float32 models that compute the same, relative to their range.

Another order of summation makes up to 1e-5; one tensor that was rounded to bfloat16 makes 1e-3.
"""
MAX_KL = 0.02
"""Nats per token that 8 bits may cost; a wrong matrix costs 0.1 or more in these models."""
INT8 = ("16bpw", "int8-g16", ["int8-g16"])
PLANS = {"mixed": ("6.5bpw", "int4-g16", None), "int8": INT8, "pinned": INT8}
"""Name of a plan -> (budget, format of embedding and head, allowed formats).

The mixed plan goes through every stage. The others must be close to the original model; the pinned one also packs what
calibration never ran, such as a vision tower.
"""


def run_case(case: Case, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Run all stages of `case` in `folder`; errors are noted in the outcome, and tracebacks in error.txt."""
    outcome = Outcome(case.name, case.class_name, case.kind)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        _Run(case, folder, outcome, tokenizer).all_stages()
    except Exception as error:  # noqa: BLE001 - whatever a stage raises is the result
        work = folder / "work"
        encoded = any(work.rglob("*.safetensors")) if work.is_dir() else False
        outcome.refused = isinstance(error, ReallmError) and outcome.stage == "measure" and not encoded
        line = str(error).strip().partition("\n")[0].replace(f"{folder}/", "")
        outcome.error = f"{type(error).__name__}: {line}"[:400]
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    outcome.seconds = round(time.monotonic() - started, 2)
    return outcome


class _Run:
    def __init__(self, case: Case, folder: Path, outcome: Outcome, tokenizer: PreTrainedTokenizerBase) -> None:
        self.case, self.folder, self.outcome, self.tokenizer = case, folder, outcome, tokenizer
        self.model, self.work, self.text = folder / "model", folder / "work", folder / "text.txt"
        self.compressed: dict[str, PreTrainedModel] = {}
        """Name of a plan -> the artifact as loaded, in float32."""
        self.references: dict[str, PreTrainedModel] = {}

    def all_stages(self) -> None:
        """Run the stages in order; `outcome.stage` names the one that runs."""
        self._build()
        self._measure()
        plans = self._plans()
        self._compile_and_compare(plans)
        self._generate()
        self._evaluate()
        self._save_and_verify()
        if self.case.kind == "image":
            self._show_picture()
        self.outcome.stage = "done"

    def _build(self) -> None:
        model = tiny_model(self.case)
        self.outcome.parameters = sum(tensor.numel() for tensor in model.parameters())
        self.ids = torch.tensor([self.tokenizer(TEXT)["input_ids"][:SEQLEN]])
        round_weights(model, self.case.dtype)
        save_model(model, self.tokenizer, self.model)
        if not runs_in(self.case.dtype, model, self.model, self.ids):
            self.outcome.notes.append(f"in float32, because the model's code does not run in {self.case.dtype}")
            save_model(model.float(), self.tokenizer, self.model)
        self.dense = copy.deepcopy(model).float()
        self.text.write_text(TEXT, encoding="utf-8")
        (self.folder / "space.yaml").write_text(SPACE, encoding="utf-8")
        try:
            self.logits = text_forward(self.dense, self.ids)
        except Exception as error:  # noqa: BLE001 - reallm must refuse this model
            self.outcome.notes.append(f"the dense model cannot be run on text: {type(error).__name__}")
            return
        if not bool(torch.isfinite(self.logits).all()):
            raise ValueError("the dense model's logits are not finite")

    def _measure(self) -> None:
        self.outcome.stage = "measure"
        space = self.folder / "space.yaml"
        pins = [".=int8-g16"] if self.case.kind == "image" else []
        self.table = reallm.measure(
            self.model,
            text=self.text,
            output=self.work,
            space=space,
            nsamples=WINDOWS,
            seqlen=SEQLEN,
            jobs=1,
            pins=pins,
        )

    def _plans(self) -> dict[str, Plan]:
        self.outcome.stage = "plan"
        measured = {record.matrix for record in self.table.measurements}
        tables = [m.name for m in self.table.matrices if m.kind in ("embedding", "head") and m.name in measured]
        plans = {name: self._plan(name, tables) for name in ("mixed", "int8")}
        plan = plans["mixed"]
        self._note_shares(plan)
        check_plan(plan, self.table)
        if self.case.kind == "image" and plan.kept:
            plans["pinned"] = self._plan("pinned", [*tables, *(name for names in plan.kept.values() for name in names)])
        return plans

    def _note_shares(self, plan: Plan) -> None:
        """Note which part of the weights is packed, and what becomes of the others."""
        total, sizes = self.outcome.parameters, {matrix.name: matrix.numel for matrix in self.table.matrices}
        packed = sum(sizes[choice.matrix] for choice, _ in packed_choices(plan))
        self.outcome.matrices = len(plan.choices)
        self.outcome.packed_share = round(packed / total, 4)
        self.outcome.other_share = round(sum(other_sizes(self.table).values()) / total, 4)
        kept = {reason: sum(sizes[name] for name in names) for reason, names in plan.kept.items()}
        self.outcome.kept = {reason: round(size / total, 4) for reason, size in kept.items()}

    def _plan(self, name: str, pinned: Iterable[str]) -> Plan:
        budget, pin, formats = PLANS[name]
        pins = [f"^{re.escape(matrix)}$={pin}" for matrix in pinned]
        return reallm.plan(self.work, budget=budget, output=self.folder / f"{name}.json", formats=formats, pins=pins)

    def _compile_and_compare(self, plans: dict[str, Plan]) -> None:
        loaded = load_model(self.model)
        for name, plan in plans.items():
            self.outcome.stage = "compile"
            reallm.compile(self.folder / f"{name}.json", self.folder / name, kernels=False)
            self.outcome.stage = "load"
            self.compressed[name], _ = reallm.load(self.folder / name, dtype=torch.float32)
            self.outcome.stage = "logits"
            self.references[name] = replaced_model(self.dense, loaded, plan, self.work)
            logits = text_forward(self.compressed[name], self.ids)
            self._note_error(name, logits, text_forward(self.references[name], self.ids))
            if name != "mixed":
                self._note_kl(f"kl_{name}", self.logits, logits)

    def _note_error(self, name: str, logits: Tensor, reference: Tensor) -> None:
        error = float((logits - reference).abs().max() / (reference.max() - reference.min()))
        self.outcome.figures[f"error_{name}"] = error
        if not error <= MAX_ERROR:
            raise ValueError(f"{name}: logits differ from the reference by {error:.2g} of their range")

    def _note_kl(self, figure: str, dense: Tensor, compressed: Tensor) -> None:
        dense, compressed = dense.log_softmax(-1), compressed.log_softmax(-1)
        kl = float((dense.exp() * (dense - compressed)).sum(-1).mean())
        self.outcome.figures[figure] = kl
        if not kl <= MAX_KL:
            raise ValueError(f"{figure}: 8 bits cost {kl:.2g} nats per token")

    def _generate(self) -> None:
        self.outcome.stage = "generate"
        if not self.dense.can_generate():
            return
        try:
            expected = self._continued(self.references["mixed"])
        except Exception as error:  # noqa: BLE001 - then the original model cannot generate either
            self.outcome.notes.append(f"transformers cannot generate with this model: {type(error).__name__}")
            return
        text = reallm.generate(self.folder / "mixed", PROMPT, max_new_tokens=NEW_TOKENS, dtype="float32")
        if text != expected:
            raise ValueError(f"generate returned {text!r}, the reference {expected!r}")

    def _evaluate(self) -> None:
        self.outcome.stage = "eval"
        result = reallm.evaluate(
            self.folder / "int8", against=self.model, text=str(self.text), seqlen=SEQLEN, windows=2, progress=False
        )
        divergence = result.comparison.divergence
        if divergence is None or not divergence.mean <= MAX_KL:
            raise ValueError(f"eval finds a divergence of {divergence} at 8 bits")

    def _continued(self, model: PreTrainedModel) -> str:
        """PROMPT and the tokens that transformers' own loop adds to it."""
        ids = torch.tensor([self.tokenizer(PROMPT)["input_ids"]])
        limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits)
        text: str = self.tokenizer.decode(output[0], skip_special_tokens=True)
        return text

    def _save_and_verify(self) -> None:
        self.outcome.stage = "save"
        saved = self.folder / "saved"
        model = self.compressed["mixed"]
        model.save_pretrained(saved)
        again = type(model).from_pretrained(saved, dtype=torch.float32).eval()
        self._note_error("saved", text_forward(again, self.ids), text_forward(model, self.ids))
        self.outcome.stage = "verify"
        reallm.verify(self.folder / "mixed")
        reallm.verify(saved)

    def _show_picture(self) -> None:
        """Compare the 8-bit models with the dense one on an input with a picture."""
        self.outcome.stage = "picture"
        logits = []
        for seed in (0, 1):
            try:
                ids, pixels = with_picture(self.dense, self.ids, seed)
                logits.append(text_forward(self.dense, ids, **pixels))
            except Exception as error:  # noqa: BLE001 - the sweep does not know the inputs of every model
                reason = str(error).partition("\n")[0]
                self.outcome.notes.append(f"no picture was tried: {type(error).__name__}: {reason}"[:200])
                return
        if torch.equal(*logits):
            self.outcome.notes.append("no picture was tried: the inputs made for it do not change the logits")
            return
        for name in ("int8", "pinned"):
            if name in self.compressed:
                compressed = text_forward(self.compressed[name], ids, **pixels)
                reference = text_forward(self.references[name], ids, **pixels)
                self._note_error(f"{name}_picture", compressed, reference)
                self._note_kl(f"kl_{name}_picture", logits[1], compressed)
