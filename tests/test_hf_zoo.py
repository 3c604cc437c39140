"""The sweep of ``benchmarks.models``: a few of its classes, what it refuses, that it notices mistakes, and its page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.models import read
from benchmarks.models_page import page, section
from tests.zoo.build import pairs
from tests.zoo.check import REFUSED, RIGHT, UNBUILT, WRONG, compare, examine, runnable
from var_kernels.integrations.hf import calibration
from var_kernels.integrations.hf.calibration import LossRule, Transform

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
PAIRS = pairs()

# What tests/hf_zoo.py has no example of; with the words by which the head is described.
RIGHT_ONES = {
    ("llava", "LlavaForConditionalGeneration"): "",
    ("mllama", "MllamaForConditionalGeneration"): "",
    ("aya_vision", "AyaVisionForConditionalGeneration"): "",  # carries a logit_scale that it does not use
    ("gemma3", "Gemma3ForConditionalGeneration"): "tied",
    ("granite_speech", "GraniteSpeechForConditionalGeneration"): "",
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"): "",
    ("idefics", "IdeficsForVisionText2Text"): "",
    ("xlm", "XLMWithLMHeadModel"): "bias, labels not shifted",
    ("kyutai_speech_to_text", "KyutaiSpeechToTextForConditionalGeneration"): "",  # 33 ids a position
    ("reformer", "ReformerModelWithLMHead"): "",
    ("t5", "T5ForConditionalGeneration"): "tied, labels not shifted",
    ("mbart", "MBartForConditionalGeneration"): "vocabulary bias",
    ("florence2", "Florence2ForConditionalGeneration"): "labels not shifted",
    ("pix2struct", "Pix2StructForConditionalGeneration"): "labels not shifted",
    ("udop", "UdopForConditionalGeneration"): "labels not shifted",
    ("vision-encoder-decoder", "VisionEncoderDecoderModel"): "labels not shifted",
}
REFUSED_ONES = {
    ("prophetnet", "ProphetNetForConditionalGeneration"): "several prediction streams",
    ("musicgen", "MusicgenForCausalLM"): "one nn.Linear, got ModuleList",
    ("fsmt", "FSMTForConditionalGeneration"): "one nn.Linear, got Embedding",
    ("cpmant", "CpmAntForCausalLM"): "is not causal",
    ("xlnet", "XLNetLMHeadModel"): "is not causal",
}


def cases(chosen):
    return [pytest.param(*key, words, id=key[0]) for key, words in chosen.items() if key in PAIRS]


@pytest.mark.parametrize(("model_type", "name", "words"), cases(RIGHT_ONES))
def test_class_is_right(model_type, name, words):
    record = examine(model_type, name, PAIRS[model_type, name])
    assert record["verdict"] == RIGHT, record["detail"]
    assert words in record["head"]
    assert record["detail"] == ""
    assert record["parameters"] < 2e6


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, id=key[0])
        for key, mappings in PAIRS.items()
        if mappings == ["SEQ_TO_SEQ_CAUSAL_LM"] and key not in RIGHT_ONES | REFUSED_ONES
    ],
)
def test_every_other_sequence_to_sequence_class_is_right(key):
    record = examine(*key, PAIRS[key])
    if key[0] == "umt5" and transformers.__version__.startswith("5.17."):  # its decoder sees later tokens there
        assert "is not causal" in record["detail"]
    else:
        assert record["verdict"] == RIGHT, record["detail"]


@pytest.mark.parametrize(("model_type", "name", "words"), cases(REFUSED_ONES))
def test_class_is_refused(model_type, name, words):
    record = examine(model_type, name, PAIRS[model_type, name])
    assert record["verdict"] == REFUSED, record["detail"]
    assert words in record["detail"]
    assert name in record["detail"]


# ---- the check notices mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"logit_scale": 1.001}, "log-probs"),
        ({"vocabulary_bias": None}, "log-probs"),
        ({"masked": (5,)}, "log-probs"),
        ({"shift": True}, "loss"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_called_wrong(monkeypatch, changes, where):
    key = ("bart", "BartForConditionalGeneration")
    model, inputs, notes = runnable(*key, PAIRS[key])
    calibration.calibrate_loss(model, encoder_decoder=True)
    _, findings = calibration._findings[model]
    for name, kind in (("transform", Transform), ("loss", LossRule)):
        known = {field.name for field in dataclasses.fields(kind)}
        mine = {field: value for field, value in changes.items() if field in known}
        findings[name] = dataclasses.replace(findings[name], **mine)
    record = compare(model, inputs, notes)
    assert record["verdict"] == WRONG
    assert where in record["detail"]


def test_a_detached_head_is_called_wrong(monkeypatch):
    key = ("llama", "LlamaForCausalLM")
    plain = Transform.params

    def params(self, head, inner):
        found = plain(self, head, inner)
        return dataclasses.replace(found, lm_head_weight=found.lm_head_weight.detach())

    monkeypatch.setattr(Transform, "params", params)
    record = examine(*key, PAIRS[key])
    assert record["verdict"] == WRONG
    assert "gradient of lm_head.weight" in record["detail"]


def test_a_class_that_does_not_build_has_a_reason():
    record = examine("llama", "NoSuchClass", ["CAUSAL_LM"])
    assert record["verdict"] == UNBUILT
    assert "NoSuchClass" in record["detail"]


# ---- the page --------------------------------------------------------------------------------------------------------


def rows_of(text):
    """{(model type, class): {version: verdict}} of every table and list."""
    found, versions = {}, []
    for line in text.splitlines():
        if listed := re.match(r"Right in ([\d.]+(?: and [\d.]+)*)[:,] ", line):
            for kind, name in re.findall(r"(\S+) `(\w+)`", line):
                assert (kind, name) not in found
                found[kind, name] = dict.fromkeys(listed[1].split(" and "), RIGHT)
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| model type"):
            versions = cells[2:-1]
        elif versions and line.startswith("| ") and {RIGHT, REFUSED, WRONG, UNBUILT} & set(cells[2:4]):
            found[cells[0], cells[1]] = dict(zip(versions, cells[2:], strict=False))
    return found


def test_the_page_says_nothing_is_wrong():
    text = PAGE.read_text()
    summaries = re.findall(r"transformers ([\d.]+): (\d+) pairs.* (\d+) right.* (\d+) refused, (\d+) wrong", text)
    assert len(summaries) == 2
    rows = rows_of(text)
    for version, total, right, refused, wrong in summaries:
        verdicts = [verdict[version] for verdict in rows.values() if verdict.get(version)]
        assert wrong == "0"
        assert WRONG not in verdicts
        assert [len(verdicts), verdicts.count(RIGHT), verdicts.count(REFUSED)] == [int(total), int(right), int(refused)]
        assert int(right) >= 0.95 * (int(right) + int(refused))


def test_the_page_lists_the_installed_classes():
    rows = rows_of(PAGE.read_text())
    version = transformers.__version__
    if not any(version in verdict for verdict in rows.values()):
        pytest.skip(f"docs/models.md was not made with transformers {version}")
    assert {key for key, verdict in rows.items() if verdict.get(version)} == set(PAIRS)


def test_results_that_were_cut_off_are_read_and_shown(tmp_path):
    record = {"type": "a", "class": "A", "mappings": ["CAUSAL_LM"], "verdict": RIGHT, "detail": "", "head": "tied"}
    other = {**record, "class": "B", "verdict": REFUSED, "detail": "B: no | head", "head": ""}
    file = tmp_path / "x.jsonl"
    lines = [json.dumps({**r, "versions": {"transformers": v}}) for v in ("5.9.0", "5.10.0") for r in (record, other)]
    file.write_text(lines[2] + "\n" + lines[3] + "\n" + lines[3] + "\n" + lines[0][:20])
    assert [r["class"] for r in read(file)] == ["A", "B"]
    older = [json.loads(line) for line in lines[:2]]
    text = page([older, read(file)])
    assert rows_of(text) == {
        ("a", "A"): {"5.10.0": RIGHT, "5.9.0": RIGHT},
        ("a", "B"): {"5.10.0": REFUSED, "5.9.0": REFUSED},
    }
    assert "no \\| head" in text
    assert section([[kind, "A", RIGHT, "", "tied"] for kind in "abc"], ["5.10.0", "5.9.0"]) == [
        "Right in 5.10.0, tied: a `A`, b `A`, c `A`.",
        "",
    ]
    assert "2 pairs of model type and class, 1 right, 1 refused, 0 wrong, 0 cannot be built here; 50.0 %" in text
