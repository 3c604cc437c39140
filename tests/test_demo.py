"""The demo: its estimators by hand, a run on the small world end to end, and the mutants that it must unmask."""

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

from benchmarks import small_world
from benchmarks.demo import experiment, output, replies, story, subject
from benchmarks.demo.__main__ import main
from benchmarks.demo.experiment import Run, Subject
from benchmarks.demo.progress import Phases
from benchmarks.demo.replies import Drawn, Sampling
from benchmarks.demo.report import write_report
from benchmarks.demo.table import print_results
from benchmarks.small_world import world
from var_kernels.integrations.from_scratch import ScratchSpec
from var_kernels.integrations.trainer import row_weights

torch.set_num_threads(1)

QUICK = dataclasses.replace(small_world.QUICK, pretrain_steps=180)  # a reference good enough for the margins below
TINY = dataclasses.replace(
    QUICK,
    model=ScratchSpec(hidden=16, layers=1, heads=1, vocab=600),
    pretrain_steps=3,
    align_steps=2,
    completions=4,
    eval_samples=2,
    memory_rows=(256,),
    sampling=Sampling(512, 6),  # an untrained model would use up every token
)
CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO(), width=200)
MARGIN = 0.3  # points of reward that VAR must gain; its optimum gains about 0.7 in the shrunken run


def tell(folder, plan=QUICK, seed=0):
    return story.tell(str(folder), plan, seed=seed, device=CPU, make=small_world.subject, console=QUIET)


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
    win = replies.win_rate(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 0.0], [2.0, -1.0]]))
    torch.testing.assert_close(win, torch.tensor([[0.75], [0.75]]))
    mean, error = replies.mean_and_error(torch.tensor([[0.0, 2.0], [3.0, 3.0]]))  # prompt means 1 and 3
    assert mean == 2.0
    assert error == pytest.approx(math.sqrt(2.0) / math.sqrt(2.0))


def test_frontier_by_hand():
    """Two equally likely replies worth 0 and 1: pi* is (1/4, 3/4) at lambda = 1 / log 3."""
    drawn = Drawn([task_of("What is 3 plus 4?").prompt], 2, [[0], [0]], ["", ""], [True, True], [0.0, 1.0])
    (point,) = small_world.frontier(drawn, [1 / math.log(3)])
    assert point["reward"] == pytest.approx(0.75)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert point["kl"] == pytest.approx(kl)
    assert point["objective"] == pytest.approx(0.75 - kl / math.log(3))
    assert point["objective"] == pytest.approx(math.log((1 + 3) / 2) / math.log(3))  # lam log Z: no policy has more


# ---- a shrunken run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(results, output directory, the small world with its reference, its optimum at the plan's lam)."""
    folder, made = tmp_path_factory.mktemp("demo") / "run", []

    def make(run, advance):
        made.append(small_world.subject(run, advance))
        return made[0]

    results = story.tell(str(folder), QUICK, seed=0, device=CPU, make=make, console=QUIET)
    (at,) = made
    many = replies.draw(at.model, at.tokenizer, at.held_out, 8, QUICK.sampling, at.reward, 3)
    return results, folder, at, small_world.frontier(many, [QUICK.lam])[0]


def load(folder, name):
    path = folder / "models" / name
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def gain(row: dict, reference: dict) -> float:
    return row["reward"] - reference["reward"]


def test_var_raises_the_sampled_reward(finished):
    results, *_, optimum = finished
    var, reference = results["table"]["VAR"], results["table"]["reference"]
    assert var["gain"] == pytest.approx(gain(var, reference))
    assert var["gain"] > max(MARGIN, 5 * var["gain_error"])
    assert gain(var, reference) > 0.5 * (optimum["reward"] - reference["reward"])
    assert var["win_rate"] > 0.6


def test_sft_without_rewards_does_not(finished):
    table = finished[0]["table"]
    assert abs(gain(table["SFT"], table["reference"])) < MARGIN / 2
    assert gain(table["DPO"], table["reference"]) > MARGIN
    assert gain(table["Best-of-n SFT"], table["reference"]) > MARGIN


def test_kl_is_zero_for_the_reference_and_near_the_optimum_for_var(finished):
    results, *_, optimum = finished
    assert results["table"]["reference"]["kl"] == 0
    assert results["table"]["reference"]["win_rate"] == pytest.approx(0.5)
    assert 0.3 * optimum["kl"] < results["table"]["VAR"]["kl"] < 2 * optimum["kl"]


MUTANTS = {
    "wrong sign": lambda var_weights: lambda rewards, *args, **options: var_weights(-rewards, *args, **options),
    "rewards ignored": lambda var_weights: lambda rewards, *args, **options: var_weights(0 * rewards, *args, **options),
    "rewards of other rows": lambda var_weights: (
        lambda rewards, *args, **options: var_weights(rewards.roll(1), *args, **options)
    ),
}


def trained(finished, folder, plan) -> dict:
    """The row of a VAR policy on the completions of the finished run."""
    results, made, at, _ = finished
    rows = [json.loads(line) for line in (made / "data" / "completions.jsonl").read_text().splitlines()]
    policy, _ = experiment.align("VAR", at, rows, Run(plan, 0, folder, CPU), lambda: None)
    drawn = replies.draw(policy, at.tokenizer, at.held_out, plan.eval_samples, plan.sampling, at.reward, 3)
    return replies.summarise(drawn, of_reference(results, at), torch.zeros(len(at.held_out), plan.eval_samples))


@pytest.mark.parametrize(
    ("mutant", "kept"),
    [("wrong sign", None), ("wrong sign", 3), ("rewards ignored", None), ("rewards of other rows", 3)],
)
def test_broken_weights_miss_the_margin(finished, tmp_path, monkeypatch, mutant, kept):
    """Also where VAR trains on the few completions that it weighs most, as on the real model."""
    monkeypatch.setattr(row_weights, "var_weights", MUTANTS[mutant](row_weights.var_weights))
    row = trained(finished, tmp_path, dataclasses.replace(QUICK, kept=kept))
    assert row["gain"] < MARGIN / 2
    assert row["gain"] < 3 * row["gain_error"]
    if mutant == "wrong sign":
        assert row["gain"] < -MARGIN


def test_the_heaviest_completions_alone_raise_the_reward(finished, tmp_path):
    row = trained(finished, tmp_path, dataclasses.replace(QUICK, kept=3))
    assert row["gain"] > max(MARGIN, 3 * row["gain_error"])


def of_reference(results: dict, at: Subject) -> Drawn:
    """The reference's replies, as far as rewards are read of them."""
    k, rewards = QUICK.eval_samples, results["rewards"]["reference"]
    return Drawn(at.held_out, k, [[0]] * len(rewards), [""] * len(rewards), [True] * len(rewards), rewards)


def test_saved_models_give_the_saved_samples_and_kl(finished):
    """What is on disk is what was measured; the KL summands equal those of plain logits."""
    results, folder, at, _ = finished
    (policy, tokenizer), reference, sampling = load(folder, "var"), at.model, QUICK.sampling
    drawn = replies.draw(policy, tokenizer, at.held_out, QUICK.eval_samples, sampling, at.reward, 4)
    saved = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert drawn.texts == [row["reply"] for row in saved if row["model"] == "VAR"]
    assert replies.rewards_of(drawn).mean().item() == pytest.approx(results["table"]["VAR"]["reward"])
    kl = replies.kl_to_reference(policy, reference, tokenizer, drawn, sampling)
    prompt, reply = tokenizer(at.held_out[1]).input_ids, drawn.token_ids[QUICK.eval_samples]
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        logp = [model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1] for model in (policy, reference)]
    picked = [rows[torch.arange(len(reply)), reply].sum().item() for rows in logp]
    assert kl[1, 0].item() == pytest.approx(picked[0] - picked[1], abs=1e-3)


def test_objective_is_reward_less_lam_kl_and_the_optimum_bounds_it(finished):
    results, folder, _, best = finished
    saved = json.loads((folder / "metrics.json").read_text())
    for row in (*results["table"].values(), best):
        assert row["objective"] == pytest.approx(row["reward"] - QUICK.lam * row["kl"], abs=1e-5)
        assert 0 < row["objective_error"] < 0.1
        assert row["objective"] < best["objective"] + 3 * math.hypot(row["objective_error"], best["objective_error"])
    assert saved["table"]["VAR"]["objective"] == results["table"]["VAR"]["objective"]


def test_terminal_fits_and_tells_the_gain(finished):
    results = finished[0]
    console = Console(file=io.StringIO(), width=80)
    print_results(console, results)
    lines = console.file.getvalue().splitlines()
    for name, row in results["table"].items():
        line = next(line for line in lines if line.strip().startswith(name.split()[0]))  # the table comes first
        assert f"{row['reward']:+.2f} ± {row['reward_error']:.2f}" in line
        if name != "reference":
            assert f"{row['gain']:+.2f} ± {row['gain_error']:.2f}" in line


def test_report_stands_alone_and_tells_the_numbers(finished):
    results, folder, *_ = finished
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<script|<link|(?:src|href)=\"(?!#)(?!data:)[^\"]*\"", report) == []
    assert report.count("<svg") == 3
    signed = lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if round(value, 2) else "0.00"  # noqa: E731
    for row in results["table"].values():
        assert f"<td>{signed(row['reward'])} ± {row['reward_error']:.2f}</td>" in report
        assert f"<td>{signed(row['objective'])} ± {row['objective_error']:.2f}</td>" in report
    for step in results["memory"]:
        assert all(f"<td>{step[loss]['peak_mib']:,.0f}</td>" in report for loss in ("plain", "fused"))
    for row in results["samples"]:
        assert row["question"] in report
    assert not re.search(r"\$[a-z_]+|\bnan\b", re.sub(r"<svg.*?</svg>", "", report, flags=re.DOTALL))


def test_a_step_that_found_no_room_is_told(finished, tmp_path):
    results = finished[0]
    step = {"tokens": 8192, "plain": None, "fused": {"peak_mib": 7000.0, "seconds": 3.0, "before_mib": 1.0}}
    changed = {**results, "memory": [*results["memory"], step]}
    write_report(tmp_path / "report.html", changed)
    assert "<td>8,192</td><td>no room</td><td>7,000</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    console = Console(file=io.StringIO(), width=80)
    print_results(console, changed)
    assert "no room" in console.file.getvalue()


def test_a_cut_reply_is_left_out_of_its_row(tmp_path):
    """Where two whole ones are left; a prompt with fewer keeps all. Messages get their completions as messages."""
    texts, ended = [str(i) for i in range(8)], [True, False, True, True, True, False, False, False]
    drawn = Drawn(["a", [{"role": "user", "content": "b"}]], 4, [[0]] * 8, texts, ended, [float(i) for i in range(8)])
    rows = experiment.rows_of(drawn)
    assert rows[0] == {"prompt": "a", "completions": ["0", "2", "3"], "rewards": [0.0, 2.0, 3.0]}
    assert [text[0]["content"] for text in rows[1]["completions"]] == ["4", "5", "6", "7"]


def test_the_heaviest_of_each_prompt_and_the_first_replies():
    row = {"prompt": "a", "completions": list("wxyz"), "rewards": [0.1, 0.9, 0.5, 0.5]}
    best = {"prompt": "a", "completions": ["x", "y"], "rewards": [0.9, 0.5]}
    assert experiment.heaviest([row, row], 2, lam=0.05) == [best, best]
    assert experiment.heaviest([row], 8, lam=0.05) == [row]
    drawn = Drawn(["a", "b"], 3, [[i] for i in range(6)], list("uvwxyz"), [True] * 6, [float(i) for i in range(6)])
    found = replies.first(drawn, 2)
    assert (found.k, found.texts, found.token_ids) == (2, list("uvxy"), [[0], [1], [3], [4]])
    assert replies.rewards_of(found).tolist() == [[0, 1], [3, 4]]
    assert replies.first(drawn, None) == replies.first(drawn, 8) == drawn


# ---- what is aligned ------------------------------------------------------------------------------------------------


def test_vader_scores_the_text():
    pytest.importorskip("vaderSentiment", reason="the demo's reward needs the extra 'dev'")
    kind, unkind, flat = subject.vader([], ["What a lovely, happy day!", "A horrible, sad day.", "The bus has wheels."])
    assert kind > 0.5
    assert unkind < -0.5
    assert flat == 0


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_the_model_is_in_the_dtype_that_the_processor_multiplies_faster(faster, monkeypatch):
    now = iter(step for dtype in (torch.float32, torch.bfloat16) for step in [0.0, 1.0 + (dtype != faster)] * 9)
    monkeypatch.setattr(subject.time, "perf_counter", lambda: next(now))
    assert subject.fast_dtype(CPU) == faster


def test_shipped_prompts():
    """Asked with or without a chat template; none of the held-out ones is trained on."""
    chat, text = subject.shipped_prompts(True), subject.shipped_prompts(False)
    shown = [[subject.question(prompt) for prompt in part] for part in text]
    assert [[subject.question(prompt) for prompt in part] for part in chat] == shown
    assert [len(part) for part in shown] == [32, 48]
    assert len({question for part in shown for question in part}) == 80
    assert all(re.fullmatch(r"[A-Z][^#\n]+[.?]", question) for part in shown for question in part)


def test_without_a_model_the_small_world_is_taken_and_said(monkeypatch):
    def nothing(*_):
        raise OSError("neither the hub nor the package index has it")

    monkeypatch.setattr("benchmarks.pretrained.fetch", nothing)
    console = Console(file=io.StringIO(), width=200)
    make, plan = story._choose(None, None, experiment.FULL, CPU, console)
    assert (make, plan) == (small_world.subject, small_world.FULL)
    assert "neither the hub nor the package index has it. Going on with a small world" in console.file.getvalue()
    with pytest.raises(OSError, match="neither the hub"):
        story._choose(None, "operator:add", experiment.FULL, CPU, console)


def test_lines_in_a_log_file():
    """One at least every half minute, with the time left of the phase and of all."""
    now = [0.0]
    console = Console(file=io.StringIO(), width=200)
    with Phases(console, {"a": 60, "b": 60}, clock=lambda: now[0]) as phases, phases.phase("a", 6) as advance:
        for _ in range(6):
            now[0] += 20
            advance()
    lines = [line.strip() for line in console.file.getvalue().splitlines() if "left" in line]
    assert lines == ["a: 2 of 6, 1:20 left; all 3:20 left", "a: 4 of 6, 0:40 left; all 2:40 left"]


# ---- the output directory -------------------------------------------------------------------------------------------


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def numbers(results: dict) -> dict:
    return {name: {key: row[key] for key in row if key != "seconds"} for name, row in results["table"].items()}


@pytest.fixture
def no_memory(monkeypatch):
    """Without the figures of memory, for which two processes are started: ``finished`` measures them."""
    step = {"peak_mib": 2.0, "seconds": 1.0, "before_mib": 1.0}
    monkeypatch.setattr(story, "compare", lambda *_: [{"tokens": 256, "plain": step, "fused": step}])


def test_a_second_run_replaces_the_first_and_repeats_it(tmp_path, no_memory):
    first = tell(tmp_path / "a", TINY, seed=5)
    (tmp_path / "a" / "mine.txt").write_text("kept")
    (tmp_path / "a" / "models" / "var" / "stale").write_text("gone")
    (tmp_path / "a" / ".partial-999999999").mkdir()  # of a run that was killed
    again = tell(tmp_path / "a", TINY, seed=5)
    assert numbers(first) == numbers(again)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*output._OWN, "mine.txt"}
    assert not (tmp_path / "a" / "models" / "var" / "stale").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, request, no_memory):
    # a shell that runs this in the background has it ignore SIGINT
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("benchmarks.demo.story.write_report", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(story, "_choose", lambda *_: (small_world.subject, dataclasses.replace(TINY, methods=("VAR",))))
    assert main(["--quick", "--cpu", "--output", str(tmp_path / "new" / "run")]) == 130
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed must be an integer >= 0, got -1"),
        (["--output", "{folder}/file"], "is a file; choose another"),
        (["--output", "{folder}/theirs"], "theirs holds data, which no demo wrote; choose another directory"),
        (["--sed", "1"], "unknown option --sed, did you mean --seed?"),
        (["--compare", "dpo,kto"], "--compare must be some of sft, best-of-n, dpo, got 'kto'; VAR is always trained"),
        (["--reward", "nothing"], "reward must be module:function, got 'nothing'"),
        (["--model", "no/such/folder"], "model must be an existing folder or a name on the hub, got no/such/folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fetched_or_written(tmp_path, capsys, monkeypatch, arguments, message):
    def fetched(*_):
        raise AssertionError("a model was fetched")

    monkeypatch.setattr("benchmarks.pretrained.fetch", fetched)
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs" / "data").mkdir(parents=True)
    before = tree(tmp_path)
    assert main([*(word.format(folder=tmp_path) for word in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before
