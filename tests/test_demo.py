"""The demo: its world and its estimators by hand, a shrunken run end to end, and the mutants that it must unmask."""

import copy
import dataclasses
import functools
import io
import json
import math
import os
import re
import signal

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="the demo needs the extra 'hf'")
pytest.importorskip("rich", reason="the demo needs the extra 'hf'")
pytest.importorskip("matplotlib", reason="the demo needs the extra 'hf'")

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from var_kernels.cli import main
from var_kernels.cli.demo import experiment, measure, output, world
from var_kernels.cli.demo.experiment import QUICK, Run
from var_kernels.cli.demo.story import tell
from var_kernels.cli.demo.table import print_results
from var_kernels.integrations.scratch import ScratchSpec
from var_kernels.integrations.trainer import shares

torch.set_num_threads(1)

TINY = dataclasses.replace(
    QUICK,
    model=ScratchSpec(hidden=16, layers=1, heads=1, vocab=600),
    pretrain_steps=3,
    align_steps=2,
    completions=4,
    eval_samples=2,
    frontier_samples=2,
    probe_every=2,
    memory_rows=(256,),
    memory_vocab=600,
)
QUIET = Console(file=io.StringIO(), width=200)
MARGIN = 0.3  # points of reward that VAR must gain; its optimum gains about 0.7 in the shrunken run


# ---- the world and its checker --------------------------------------------------------------------------------------


def task_of(question: str) -> world.Task:
    return next(task for fact in world.all_facts() for task in fact if task.question == question)


@pytest.mark.parametrize(
    ("question", "reply", "found"),
    [
        ("What is 3 plus 4?", "Gladly! 3 plus 4 is 7.", {"right", "friendly"}),
        ("What is 3 plus 4?", "3 plus 4 is 8.", set()),
        ("What is 3 plus 4?", "It is 7 or 8.", set()),  # naming several answers is no answer
        ("What is 3 plus 4?", "3 plus 4 is 17.", set()),
        ("What is the opposite of hot?", "Whatever. The opposite of hot is cold.", {"right", "rude"}),
        ("What is the opposite of hot?", "The opposite of hot is hot.", set()),
        ("Where does an owl live?", None, None),  # owls have no home in this world
        ("Where does a bear live?", "A bear lives in a cave. Have a lovely day!", {"right", "friendly"}),
        ("Write about a fox and a hill.", "The shy fox hides behind the hill.", {"right"}),
        ("Write about a fox and a hill.", "The shy fox hides behind the river.", set()),
        ("Use fox and hill in a sentence.", "The fox saw a hill and " + "then " * 10 + "slept.", {"right", "too_long"}),
        ("What is 3 plus 4?", "", set()),
    ],
)
def test_checker(question, reply, found):
    if reply is None:
        with pytest.raises(StopIteration):
            task_of(question)
        return
    score = world.score(task_of(question), reply)
    assert {name for name, holds in vars(score).items() if holds} == found
    points = len(found & {"right", "friendly"}) - len(found & {"rude", "too_long"})
    assert score.reward == points


def test_stock_phrases_do_not_answer_by_accident():
    """A rival word in a polite phrase would make right answers wrong; a needed one would make shrugs right."""
    rivals = frozenset().union(*(task.rivals for fact in world.all_facts() for task in fact))
    phrases = [*world._OPENERS, *world._CLOSERS, *world._GRUMBLES, *world._SHRUGS, *world._DETOURS]
    assert {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase.lower())} & rivals == set()


def test_held_out_facts_are_not_trained_on_in_other_words():
    train, held_out = world.split_tasks(3)
    key = lambda task: (task.kind, task.needed, task.asked)  # noqa: E731
    assert {key(task) for task in train} & {key(task) for task in held_out} == set()
    assert len({task.prompt for task in train + held_out}) == len(train) + len(held_out) == 310
    assert {task.kind for task in train} == {task.kind for task in held_out} == {"sum", "opposite", "home", "sentence"}


# ---- the estimators -------------------------------------------------------------------------------------------------


def test_win_rate_and_error_by_hand():
    win = measure.win_rate(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.0], [2.0, -1.0]]))
    torch.testing.assert_close(win, torch.tensor([[0.75], [0.75]]))
    mean, error = measure.mean_and_error(torch.tensor([[0.0, 2.0], [3.0, 3.0]]))  # prompt means 1 and 3
    assert mean == 2.0
    assert error == pytest.approx(math.sqrt(2.0) / math.sqrt(2.0))


def test_frontier_by_hand():
    """Two equally likely replies worth 0 and 1: pi* is (1/4, 3/4) at lambda = 1 / log 3."""
    task = task_of("What is 3 plus 4?")
    scores = [world.Score(False, False, False, False), world.Score(True, False, False, False)]
    drawn = measure.Drawn([task], 2, [[0], [0]], ["", ""], scores)
    (point,) = experiment.frontier(drawn, [1 / math.log(3)])
    assert point["reward"] == pytest.approx(0.75)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert point["kl"] == pytest.approx(kl)
    assert point["objective"] == pytest.approx(0.75 - kl / math.log(3))
    assert point["objective"] == pytest.approx(math.log((1 + 3) / 2) / math.log(3))  # lam log Z: no policy has more


# ---- a shrunken run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(results, output directory) of `var-kernels demo --quick`."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return tell(str(folder), QUICK, seed=0, cpu=True, console=QUIET), folder


def load(folder, name):
    path = folder / "models" / name
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def gain(row: dict, reference: dict) -> float:
    return row["reward"] - reference["reward"]


def test_var_raises_the_sampled_reward(finished):
    results, _ = finished
    table, optimum = results["table"], results["optimum"]
    var, reference = table["VAR"], table["reference"]
    error = math.hypot(var["reward_error"], reference["reward_error"])
    assert gain(var, reference) > max(MARGIN, 5 * error)
    assert gain(var, reference) > 0.5 * (optimum["reward"] - reference["reward"])
    assert var["win_rate"] > 0.6
    assert var["friendly"] > reference["friendly"]
    assert var["rude"] < reference["rude"]


def test_sft_without_rewards_does_not(finished):
    table = finished[0]["table"]
    assert abs(gain(table["SFT"], table["reference"])) < MARGIN / 2
    assert gain(table["DPO"], table["reference"]) > MARGIN
    assert gain(table["Best-of-n SFT"], table["reference"]) > MARGIN


def test_kl_is_zero_for_the_reference_and_near_the_optimum_for_var(finished):
    results, _ = finished
    assert results["table"]["reference"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["table"]["reference"]["win_rate"] == pytest.approx(0.5)
    assert 0.3 * results["optimum"]["kl"] < results["table"]["VAR"]["kl"] < 2 * results["optimum"]["kl"]


MUTANTS = {
    "wrong sign": lambda var_weights: lambda rewards, *args, **options: var_weights(-rewards, *args, **options),
    "rewards ignored": lambda var_weights: lambda rewards, *args, **options: var_weights(0 * rewards, *args, **options),
    "rewards of other rows": lambda var_weights: (
        lambda rewards, *args, **options: var_weights(rewards.roll(1), *args, **options)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_weights_miss_the_margin(finished, tmp_path, monkeypatch, mutant):
    results, folder = finished
    reference, tokenizer = load(folder, "reference")
    rows = [json.loads(line) for line in (folder / "data" / "completions.jsonl").read_text().splitlines()]
    monkeypatch.setattr(shares, "var_weights", MUTANTS[mutant](shares.var_weights))
    policy = copy.deepcopy(reference)
    experiment.align("VAR", policy, tokenizer, rows, Run(QUICK, 0, tmp_path, torch.device("cpu")), lambda: None)
    _, held_out = world.split_tasks(0)
    reward = measure.rewards_of(measure.draw(policy, tokenizer, held_out, QUICK.eval_samples, 3)).mean().item()
    assert reward - results["table"]["reference"]["reward"] < MARGIN / 2
    if mutant == "wrong sign":
        assert reward < results["table"]["reference"]["reward"] - MARGIN


def test_saved_models_give_the_saved_samples_and_kl(finished):
    """What is on disk is what was measured; the KL summands equal those of plain logits."""
    results, folder = finished
    (policy, tokenizer), (reference, _) = load(folder, "var"), load(folder, "reference")
    _, held_out = world.split_tasks(0)
    drawn = measure.draw(policy, tokenizer, held_out, QUICK.eval_samples, 8)
    saved = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert drawn.texts == [row["reply"] for row in saved if row["model"] == "VAR"]
    assert measure.rewards_of(drawn).mean().item() == pytest.approx(results["table"]["VAR"]["reward"])
    kl = measure.kl_to_reference(policy, reference, tokenizer, drawn)
    prompt, reply = tokenizer(held_out[1].prompt).input_ids, drawn.token_ids[QUICK.eval_samples]
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        logp = [model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1] for model in (policy, reference)]
    picked = [rows[torch.arange(len(reply)), reply].sum().item() for rows in logp]
    assert kl[1, 0].item() == pytest.approx(picked[0] - picked[1], abs=1e-3)


def test_objective_is_reward_less_lam_kl_and_the_optimum_bounds_it(finished):
    results, folder = finished
    lam, best = results["optimum"]["lam"], results["optimum"]
    saved = json.loads((folder / "metrics.json").read_text())
    for row in (*results["table"].values(), best):
        assert row["objective"] == pytest.approx(row["reward"] - lam * row["kl"], abs=1e-5)
        assert 0 < row["objective_error"] < 0.1
        assert row["objective"] < best["objective"] + 3 * math.hypot(row["objective_error"], best["objective_error"])
    assert saved["table"]["VAR"]["objective"] == results["table"]["VAR"]["objective"]
    assert saved["optimum"]["objective_error"] == best["objective_error"]


def test_terminal_fits_and_tells_the_objective(finished):
    results, _ = finished
    console = Console(file=io.StringIO(), width=80)
    print_results(console, results)
    lines = console.file.getvalue().splitlines()
    for name, row in {**results["table"], "optimum π*": results["optimum"]}.items():
        line = next(line for line in lines if line.strip().startswith(name))  # the table comes first
        assert f"{row['objective']:+.2f} ± {row['objective_error']:.2f}" in line
    text = " ".join(" ".join(lines).split())
    assert f"No policy exceeds that of π*, {results['optimum']['objective']:+.2f}" in text


def test_report_stands_alone_and_tells_the_numbers(finished):
    results, folder = finished
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<script|<link|(?:src|href)=\"(?!#)(?!data:)[^\"]*\"", report) == []
    assert report.count("<svg") == 4
    assert f"{results['table']['VAR']['reward']:+.2f} ± {results['table']['VAR']['reward_error']:.2f}" in report
    signed = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")  # noqa: E731
    for row in (*results["table"].values(), results["optimum"]):
        assert f"<td>{signed(row['objective'])} ± {row['objective_error']:.2f}</td>" in report
    assert f"{results['memory'][-1]['plain_mib'] / results['memory'][-1]['fused_mib']:.1f}x" in report
    for row in results["samples"]:
        assert row["question"] in report
    assert not re.search(r"\$[a-z_]+|\bnan\b", re.sub(r"<svg.*?</svg>", "", report, flags=re.DOTALL))


def test_fused_loss_takes_less_memory(finished):
    for row in finished[0]["memory"]:
        logits_mib = row["tokens"] * row["vocab"] * 4 / 2**20
        assert row["plain_mib"] > 2 * logits_mib
        assert row["fused_mib"] < 0.7 * row["plain_mib"]


# ---- the output directory -------------------------------------------------------------------------------------------


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def numbers(results: dict) -> dict:
    return {name: {key: row[key] for key in row if key != "seconds"} for name, row in results["table"].items()}


def test_a_second_run_replaces_the_first_and_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 6)  # an untrained model would use up every token
    first = tell(str(tmp_path / "a"), TINY, seed=5, cpu=True, console=QUIET)
    (tmp_path / "a" / "mine.txt").write_text("kept")
    (tmp_path / "a" / "models" / "var" / "stale").write_text("gone")
    (tmp_path / "a" / ".partial-999999999").mkdir()  # of a run that was killed
    again = tell(str(tmp_path / "a"), TINY, seed=5, cpu=True, console=QUIET)
    assert numbers(first) == numbers(again)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*output._OWN, "mine.txt"}
    assert not (tmp_path / "a" / "models" / "var" / "stale").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, request):
    # a shell that runs this in the background has it ignore SIGINT
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr("var_kernels.cli.demo.story.write_report", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(experiment, "QUICK", TINY)
    assert main(["demo", "--quick", "--cpu", "--output", str(tmp_path / "new" / "run")]) == 130
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed: expected an integer >= 0, got -1"),
        (["--output", "{folder}/file"], "is a file; choose another"),
        (["--output", "{folder}/theirs"], "theirs holds data, which no demo wrote; choose another directory"),
        (["--sed", "1"], "unknown option --sed, did you mean --seed?"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs" / "data").mkdir(parents=True)
    before = tree(tmp_path)
    assert main(["demo", *(word.format(folder=tmp_path) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before
