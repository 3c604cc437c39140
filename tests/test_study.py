"""The study: a shrunken run of every section, its resumption and its failures, and its figures by hand."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="the study needs the extra 'hf'")
pytest.importorskip("rich", reason="the study needs the extra 'hf'")
pytest.importorskip("matplotlib", reason="the study needs the extra 'hf'")

from benchmarks.demo.replies import Drawn
from benchmarks.small_world import world
from benchmarks.study import claims, measure, real, stages, world_runs
from benchmarks.study.__main__ import main
from benchmarks.study.claims import CONFIRMED, OPEN, REFUTED, Line
from benchmarks.study.plan import FULL, METHODS, QUICK, REAL, RealPlan
from benchmarks.study.tables import number, spread
from tests.tiny_training import ROWS, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.trainer import VARTrainer, method_config, row_weights

torch.set_num_threads(1)


# ---- a shrunken run -------------------------------------------------------------------------------------------------


def run(folder, *options):
    return main(
        ["--quick", "--cpu", "--work", str(folder / "work"), "--rewards", str(folder / "rated.jsonl"), *options]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of `python -m benchmarks.study --quick --rewards FILE`."""
    folder = tmp_path_factory.mktemp("study")
    rows = [
        {
            "prompt": f"What is {a} plus {b}?",
            "completions": [f"It is {a + b}, I think.", "No idea at all.", f"{a + b}"],
            "rewards": [1.0, 0.0, 0.5],
        }
        for a in range(4)
        for b in range(3)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder) == 0
    return folder


def results_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "work" / "results").glob("*.json")}


def test_every_section_is_there(finished):
    page = (finished / "work" / "docs" / "study.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings == [
        "What was run", "The methods", "The claims", "Long runs", "Reward heads", "A file of rated completions",
        "Learning rates", "Settings", "Not testable here", "Again",
    ]  # fmt: skip
    assert "figures that mean nothing" in page
    assert not re.search(r"\$[a-z_]|\bnan\b|unknown|failed", page)
    for name in QUICK.methods:
        assert f"\n| {name} | " in page
    for name in METHODS:  # in the table of settings
        assert f"| {name} | `{METHODS[name].method}` |" in page
    pictures = set(re.findall(r"\]\((study-.*\.png)\)", page))
    assert pictures == {path.name for path in (finished / "work" / "docs").glob("*.png")}
    assert len(pictures) == 5
    answered = re.findall(r"^### (.*): (.*)$", page, re.MULTILINE)
    assert len(answered) >= 5
    for claim, answer in answered:
        assert f"| {claim} | **{answer}** |" in page


def test_tables_hold_every_run(finished):
    lines = {path.stem: path.read_text().splitlines() for path in (finished / "work" / "csv").glob("*.csv")}
    seeds, runs = len(QUICK.seeds), len(QUICK.methods)
    long = len([name for name in QUICK.methods if name in ("VAR", "DPO")])
    assert set(lines) == {"methods", "curves", "rates", "heads", "real"}
    assert len(lines["methods"]) == 1 + seeds * (1 + runs + long)
    assert len(lines["curves"]) == 1 + seeds * (runs * len(QUICK.probes) + long * len(QUICK.long_probes))
    assert len(lines["heads"]) == 1 + seeds * len(QUICK.head_noise) * 3
    assert len(lines["real"]) == 1 + 1 + seeds * len(set(REAL) & set(QUICK.methods))


def test_a_finished_run_is_not_repeated(finished, capsys):
    """Here without the file of rated completions, whose part is then a line."""
    before = results_of(finished)
    assert main(["--quick", "--cpu", "--work", str(finished / "work"), "--docs", str(finished / "other")]) == 0
    assert results_of(finished) == before
    assert "0 runs made" in capsys.readouterr().out
    pages = [(finished / docs / "study.md").read_text() for docs in ("work/docs", "other")]
    world_part = [page.split("## A file of rated completions")[0] for page in pages]
    assert world_part[0] == world_part[1]
    assert "No file was given, so this part is left out" in pages[1]
    assert not (finished / "other" / "study-real.png").exists()


def test_a_failed_run_is_named_and_the_rest_still_runs(finished, tmp_path, monkeypatch, capsys):
    """One result is missing and its run fails, another is missing and does not, a third is of other settings."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    stored = tmp_path / "work" / "results"
    for name in ("method-dpo-1", "method-var-0"):
        (stored / f"{name}.json").unlink()
    stale = json.loads((stored / "long-var-0.json").read_text())
    stale["settings"]["rate"] = 7.0
    (stored / "long-var-0.json").write_text(json.dumps(stale))
    before = results_of(tmp_path)

    def fail(context, seed, name, **arguments):
        if name == "DPO":
            raise RuntimeError("no luck today")
        return world_runs.align(context, seed, name, **arguments)

    monkeypatch.setattr(stages, "align", fail)
    assert run(tmp_path) == 1
    assert "method-dpo-1: RuntimeError: no luck today" in capsys.readouterr().out
    page = (tmp_path / "work" / "docs" / "study.md").read_text()
    assert "- `method-dpo-1`: RuntimeError: no luck today" in page
    assert "\n| DPO | " in page  # by its other seed
    after = results_of(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"method-var-0.json", "long-var-0.json"}
    assert "RuntimeError" in (stored / "method-dpo-1.log").read_text()

    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert not (stored / "method-dpo-1.log").exists()
    assert "no luck" not in (tmp_path / "work" / "docs" / "study.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rewards", "nowhere.jsonl"], "expected a file, nowhere.jsonl is none"),
        (["--jobs", "0"], "at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--quick", *options])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


# ---- the claims -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "higher", "verdict"),
    [
        ([1.0, 1.1, 1.2], [0.0, 0.0, 0.0], True, CONFIRMED),
        ([1.0, 1.1, 1.2], [0.0, 0.0, 0.0], False, f"{REFUTED}: the opposite"),
        ([-1.0, -1.1, -1.2], [0.0, 0.0, 0.0], False, CONFIRMED),
        ([0.1, 1.0, 3.0], [0.0, 0.0, 0.0], True, REFUTED),  # 1.37 ± 0.86: t = 1.6
        ([0.5, 1.0, 1.5], [0.0, 0.0, 0.0], True, CONFIRMED),  # t = 3.46, above 2.92
        ([0.4, 1.0, 1.6], [0.0, 0.0, 0.0], True, REFUTED),  # t = 2.89
        ([1.0, 1.0, -0.1], [0.0, 0.0, 0.0], True, REFUTED),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], True, REFUTED),
        ([1.0], [0.0], True, OPEN),
        ([1.0, math.nan], [0.0, 0.0], True, OPEN),
    ],
)
def test_verdicts(first, second, higher, verdict):
    values = tuple(dict(enumerate(side)) for side in (first, second))
    assert Line("", "a", "b", values, higher).verdict == verdict


def test_seeds_are_paired():
    line = Line("", "a", "b", ({0: 1.0, 2: 5.0}, {2: 1.0, 1: 9.0, 0: 0.5}))
    assert line.differences == [0.5, 4.0]


def test_a_claim_is_what_its_comparisons_are():
    good, bad = ({0: 1.0, 1: 1.01}, {0: 0.0, 1: 0.0}), ({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.01})
    lines = [Line("", "a", "b", good), Line("", "a", "b", bad), Line("", "a", "b", ({}, {}))]
    assert claims.Claim("", "", lines[:1]).verdict == CONFIRMED
    assert claims.Claim("", "", lines[1:]).verdict == REFUTED
    assert claims.Claim("", "", lines[2:]).verdict == OPEN
    assert claims.Claim("", "", lines).verdict == f"{CONFIRMED} in part (1 of 2 comparisons)"


def test_falls_and_lost_entropy_by_hand():
    curve = [{"reward": 0.0, "x": 3.0}, {"reward": 1.5, "x": 9.0}, {"reward": 1.0, "x": 1.0}]
    assert claims.fall(curve) == 0.5
    assert claims.change("x")(curve) == -2.0
    optima = [{"reward": 0.0, "entropy": 6.0}, {"reward": 2.0, "entropy": 4.0}]
    for reward, best in ((1.0, 5.0), (0.5, 5.5), (-1.0, 6.0), (3.0, 4.0), (2.0, 4.0)):
        table = {"a": {0: {"final": {"reward": reward, "entropy": 3.0}}}}
        assert claims.lost_entropy(table, "a", {0: {"optima": optima}}) == {0: best - 3.0}


def test_numbers_as_they_are_shown():
    assert number(-0.001) == "0.00"
    assert number(-1234.5, 1) == "\N{MINUS SIGN}1,234.5"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([0.5], 0, 100) == "50"


# ---- what is measured -----------------------------------------------------------------------------------------------


def two_replies():
    """One prompt, two replies worth 0 and 1 of equal probability under the reference."""
    prompt = world.all_facts()[0][0].prompt
    return Drawn([prompt], 2, [[5, 1], [6, 7, 8, 1]], ["a", "b"], [True, True], [0.0, 1.0])


def test_optimum_by_hand(monkeypatch):
    """pi* is (1/4, 3/4) at lam = 1 / log 3, the objective lam log Z."""
    drawn, lam = two_replies(), 1 / math.log(3)
    monkeypatch.setattr(measure, "draw", lambda *_, **__: drawn)
    monkeypatch.setattr(measure, "reply_logps", lambda *_: torch.full((1, 2), math.log(0.5)))
    (point,) = measure.optimum(None, None, drawn.prompts, 2, 0, 48, [lam])
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert point["entropy"] == pytest.approx(entropy)
    assert point["objective"] == pytest.approx(lam * math.log(0.5 * 1 + 0.5 * 3))


def test_figures_of_replies_by_hand(monkeypatch):
    drawn = two_replies()
    monkeypatch.setattr(measure, "draw", lambda *_, **__: drawn)
    logps = {"policy": torch.tensor([[-1.0, -2.0]]), "reference": torch.tensor([[-2.0, -4.0]])}
    monkeypatch.setattr(measure, "reply_logps", lambda model, *_: logps[model])
    found = measure.look("policy", "reference", None, drawn.prompts, 2, 0, 48)
    assert found == {"reward": 0.5, "kl": 1.5, "entropy": 1.5, "length": 3.0, "distinct": 1.0}
    twice = dataclasses.replace(drawn, texts=["a", "a"])
    monkeypatch.setattr(measure, "draw", lambda *_, **__: twice)
    assert measure.look("policy", "reference", None, drawn.prompts, 2, 0, 48)["distinct"] == 0.5


def test_log_probs_of_texts_are_those_of_the_model():
    model = tiny_model()
    texts = measure.Texts(ROWS[:2], tokenizer(), 32)
    ids, labels = texts.batch([4], "cpu")["input_ids"], texts.batch([4], "cpu")["labels"]
    logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    expected = logp[labels[0, 1:] != -100].sum()
    assert texts.logps(model)[4].item() == pytest.approx(expected.item(), rel=1e-6)
    assert int(texts.lengths[4]) == int((labels != -100).sum())


def test_best_against_worst():
    rows = [
        {"prompt": "p", "completions": ["x", "y", "z"], "rewards": [0.0, 2.0, -1.0]},
        {"prompt": "q", "completions": ["x", "y"], "rewards": [1.0, 1.0]},
        {"prompt": "r", "completions": ["x", "y"], "rewards": [1.0, 2.0]},
    ]
    first = {"prompt": "p", "chosen": "y", "rejected": "z"}
    assert measure.best_and_worst(rows, 5) == [first, {"prompt": "r", "chosen": "y", "rejected": "x"}]
    assert measure.best_and_worst(rows, 1) == [first]


def test_labels_are_flipped_as_often_as_said():
    rows = [{"prompt": str(i), "completions": ["good", "bad"], "rewards": [1.0, 0.0]} for i in range(2000)]
    pairs = world_runs.noisy_pairs(rows, 0.3, seed=1)
    assert len(pairs) == 2000
    assert sum(pair["chosen"] == "bad" for pair in pairs) / 2000 == pytest.approx(0.3, abs=0.04)
    assert all(pair["chosen"] == "good" for pair in world_runs.noisy_pairs(rows, 0.0, seed=1))


def test_figures_of_the_rated_file_by_hand():
    """Two prompts; the policy has moved by 2 nats on the best completion of the first, of two tokens, by none else."""
    encoded = SimpleNamespace(groups=[[0, 1], [2, 3]], reward=torch.tensor([1.0, 0.0, 0.5, 0.45]))
    ref = torch.tensor([-8.0, -4.0, -3.0, -6.0])
    moved = ref + torch.tensor([2.0, 0.0, 0.0, 0.0])
    texts = SimpleNamespace(encoded=encoded, lengths=torch.tensor([2, 2, 1, 2]), logps=lambda model: moved)
    found = real._figures(None, texts, ref, RealPlan(lam=0.5))
    w = math.exp(2) / (math.exp(2) + 1)
    assert found["clear_pairs"] == 1  # 0.5 and 0.45 are too close
    assert found["pair_accuracy"] == 1.0
    assert found["likelihood_accuracy"] == 0.0  # it is still the less likely of the two
    assert found["lift"] == pytest.approx((w - 0.5) * 1.0 / 2)
    assert found["nll"] == pytest.approx((2.5 + 3.0) / 2)
    still = SimpleNamespace(encoded=encoded, lengths=texts.lengths, logps=lambda model: ref)
    same = real._figures(None, still, ref, RealPlan(lam=0.5))
    assert same["pair_accuracy"] == 0.5
    assert same["lift"] == 0.0


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_methods_take_their_settings():
    """Every entry's settings are taken by its method's config, and all of the issue's systems are there."""
    for entry in (*METHODS.values(), *REAL.values()):
        online = world_runs._online_settings(FULL, FULL.steps) if entry.online else {}
        method_config(entry.method)("unused", max_length=96, use_cpu=True, **entry.resolved(0.5), **online)
    assert {entry.method for entry in METHODS.values()} >= {
        "sft", "var", "ava_p", "sail_dp", "sail_pp", "sail_pr", "dpo", "ipo", "slic", "alol", "dro", "kto", "grpo",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::var_kernels.losses.CollapsedWeightsWarning")
def test_estimators_that_are_one_in_the_trainer(tmp_path):
    """The report says so, and runs only one of each."""
    step = {
        "reward": torch.tensor([1.0, 0.0, 2.0, -1.0]),
        "ref_logp": torch.tensor([-3.0, -5.0, -2.0, -9.0]),
        "length": torch.tensor([2, 3, 1, 4]),
        "group": torch.tensor([0, 0, 1, 1]),
    }

    def share(normalizer, reference):
        config = tiny_config(tmp_path, normalizer=normalizer, reference=reference)
        return row_weights.var(dict(step), config, None)[0]["weight"]

    torch.testing.assert_close(share("batch", "sum"), share("batch_mean", "sum"))
    torch.testing.assert_close(share("group", "none"), share("self_normalised", "none"))
    assert not torch.allclose(share("batch", "none"), share("group", "none"))


def test_mixed_sail_is_dpo_but_for_its_own_share(tmp_path):
    def weights(method, **options):
        model = copy.deepcopy(tiny_model())
        trainer_class = VARTrainer
        if "own_share" in options:
            trainer_class = world_runs.MixedSail
        config = tiny_config(tmp_path, method=method, beta=0.5, max_steps=3)
        trainer_class(model, config, ROWS, processing_class=tokenizer(), **options).train()
        return model.lm_head.weight.detach()

    dpo, pure = weights("dpo"), weights("sail_dp")
    torch.testing.assert_close(weights("sail_dp", own_share=0.0), dpo, rtol=0, atol=1e-12)
    half = weights("sail_dp", own_share=0.5)
    assert not torch.allclose(half, dpo, atol=1e-9)
    assert not torch.allclose(half, pure, atol=1e-9)


def test_the_study_on_a_real_model_with_a_tiny_one(tmp_path, monkeypatch):
    """``benchmarks.real study``: a row a method and seed, those that are done left out; VAR's lam is its own."""
    pytest.importorskip("peft", reason="adapters need peft")
    from benchmarks.real import study

    tokenizer().save_pretrained(tmp_path)
    words = type(tokenizer()).from_pretrained(tmp_path)
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(study, "load", lambda *_: (tiny_model(1, torch.float32), words))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    sizes = study.Sizes(steps=2, completions=2, max_length=32, held_out=3, sampled=2, lam=1.0)
    done = {("reference", "0", str(sizes)), ("SFT", "3", str(sizes))}
    rows = list(study.runs(file, [3], sizes, done))
    assert [row["method"] for row in rows] == ["Best-of-n SFT", "DPO", "VAR", study.SHARP]
    assert all(row.keys() <= set(study.COLUMNS) for row in rows)
    assert rows[3]["ess_share"] < rows[2]["ess_share"] <= 1
    assert rows[3]["lift"] != rows[2]["lift"]
