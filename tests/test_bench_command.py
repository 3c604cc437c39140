"""``var-kernels bench``: figures that hang together, and the comparison of two runs."""

import base64
import json
import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import torch

from var_kernels.cli import main
from var_kernels.cli.bench import measure, report, sides
from var_kernels.cli.bench.measure import BARE, MODES, Operands

TOKENS, HIDDEN, VOCAB = 160, 32, 4000


def fails(*_operands):
    raise RuntimeError("no kernel image")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run without torch.compile, with a loss that fails."""
    folder = tmp_path_factory.mktemp("bench")
    config = {"model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        losses = {sides.OURS: sides.ours, sides.OURS_ANY: sides.ours_any, sides.PLAIN: sides.plain, "broken": fails}
        patch.setattr(sides, "find_sides", lambda device: (losses, {"Liger": "not installed"}))
        words = ["--model", str(folder), "--tokens", str(TOKENS), "--masked", "0.25", "--seconds", "100000"]
        assert main(["bench", *words, "--output", str(folder / "out")]) == 0
    return folder / "out", json.loads((folder / "out" / "bench.json").read_text())


def row(results, side, mode):
    return next(r for r in results["rows"] if (r["side"], r["mode"]) == (side, mode))


def test_every_loss_has_figures_in_every_mode(finished):
    _, results = finished
    assert [results["about"][name] for name in ("hidden", "vocab", "tokens", "dtype")] == [
        HIDDEN,
        VOCAB,
        TOKENS,
        "float32",
    ]
    for mode in MODES:
        bare = row(results, BARE, mode)
        for side in (sides.OURS, sides.OURS_ANY, sides.PLAIN):
            found = row(results, side, mode)
            assert found["p20"] <= found["ms"] <= found["p80"]
            assert found["tokens_per_second"] == pytest.approx(1e3 * TOKENS / found["ms"])
            assert found["percent_of_gemms"] == pytest.approx(100 * bare["ms"] / found["ms"])
            assert found["error"] < 1e-5
    ours, plain = (row(results, side, "training")["peak_mib"] for side in (sides.OURS, sides.PLAIN))
    assert plain == pytest.approx(12 * TOKENS * VOCAB / 2**20, rel=0.05)
    assert ours < plain


def test_a_loss_that_fails_costs_itself_alone(finished):
    folder, results = finished
    assert {row(results, "broken", mode)["note"] for mode in MODES} == {"failed: RuntimeError: no kernel image"}
    assert (folder / "bench.html").read_text().count("<p>broken: failed: RuntimeError: no kernel image.</p>") == len(
        MODES
    )


class Clock:
    """Time that passes only in the losses and the bare GEMMs."""

    def __init__(self, share=1.0):
        self.now, self.share = 0.0, share

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / self.share

    def slow(self, seconds, call):
        def run(*operands):
            self.now += seconds
            return call(*operands)

        return run


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 3.0, 8.0, 12.0])
def test_no_machine_is_too_slow_for_the_time(scale, monkeypatch):
    """GEMMs of ``scale`` seconds, losses of 1.5 to 4 times that, one of which compiles for 20: 150 seconds are kept."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    gemms = Operands.bare_gemms
    monkeypatch.setattr(Operands, "bare_gemms", lambda self, mode: clock.slow(scale, gemms(self, mode)))
    compiled = []

    def compiles(*operands):
        clock.now += 0 if compiled else 20
        compiled.append(1)
        return sides.plain(*operands)

    losses = {
        sides.OURS: clock.slow(1.5 * scale, sides.ours),
        sides.PLAIN: clock.slow(4 * scale, sides.plain),
        "torch.compile": clock.slow(3 * scale, compiles),
    }
    operands = Operands(8, 4, 50, torch.float32, torch.device("cpu"), 0.0)
    rows = measure.measure(operands, losses, 150.0, None, lambda what: None)
    assert clock.now <= 150
    timed = [row for row in rows if row.ms is not None]
    assert len(rows) == 4 * len(MODES)
    assert all(row.note == measure._NO_TIME for row in rows if row.ms is None)
    ours = next(row for row in rows if row.side == sides.OURS)
    assert ours.ms == pytest.approx(1.5e3 * scale)
    if scale <= 1:
        assert len(timed) == len(rows)
    if scale == 0.3:
        assert clock.now > 130  # what is left is used


def test_a_busy_machine_does_not_begin_what_would_compile_too_long(monkeypatch):
    """A fifth of a processor: 20 seconds of compiling are 100 on the clock."""
    clock = Clock(share=5.0)
    monkeypatch.setattr(measure, "time", clock)
    gemms = Operands.bare_gemms
    monkeypatch.setattr(Operands, "bare_gemms", lambda self, mode: clock.slow(4.0, gemms(self, mode)))
    losses = {sides.OURS: clock.slow(4.0, sides.ours), "torch.compile": clock.slow(100.0, sides.plain)}
    operands = Operands(8, 4, 50, torch.float32, torch.device("cpu"), 0.0)
    rows = measure.measure(operands, losses, 110.0, None, lambda what: None)
    assert clock.now <= 110
    assert {row.side for row in rows if row.ms is not None} == {BARE, sides.OURS}


@pytest.mark.parametrize(("scale", "rows"), [(1e-4, 1024), (0.1, 1024), (0.4, 256), (60.0, 128)])
def test_a_slow_machine_times_fewer_rows(scale, rows, monkeypatch):
    """GEMMs of ``scale`` seconds for 128 rows; the share without a label stays, and what is left ends in time."""
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    gemms = Operands.bare_gemms
    monkeypatch.setattr(
        Operands,
        "bare_gemms",
        lambda self, mode: clock.slow(scale * len(self.labels) / 128, gemms(self, mode)),
    )
    operands = Operands(1024, 4, 50, torch.float32, torch.device("cpu"), 0.25)
    operands.shorten(6, 150.0)
    assert [len(operands.hidden), len(operands.labels)] == [rows, rows]
    assert (operands.labels == -100).sum() == rows // 4
    assert operands.hidden.requires_grad


def test_the_sentence_tells_the_figures(finished, capsys):
    folder, results = finished
    page = (folder / "bench.html").read_text()
    ours, plain = (row(results, side, "training") for side in (sides.OURS, sides.PLAIN))
    assert f"{ours['ms']:,.0f} ms and {ours['peak_mib']:,.0f} MiB with var_kernels" in page
    assert f"{plain['peak_mib'] / ours['peak_mib']:.1f} times less memory" in page
    assert re.findall(r"<script|<link|(?:src|href)=\"(?!data:)[^\"]*\"", page) == []
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert picture == (folder / "bench.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_mode_without_figures_has_no_table_and_no_axes(finished):
    _, results = finished
    cut = json.loads(json.dumps(results))
    for found in cut["rows"]:
        if found["mode"] == "scoring":
            found |= {"ms": None, "note": "not run: a reason"}
    assert report.timed_modes(cut) == ["training", "frozen head"]
    text = report.page(cut, report.draw(cut))
    assert "<p>not run: a reason.</p>" in text
    assert text.count('<div class="wide">') == 2
    assert report.page(results, b"").count('<div class="wide">') == 3
    report.draw({**cut, "rows": []})


def test_compare(finished, tmp_path, capsys):
    folder, results = finished
    assert main(["bench", "compare", str(folder), str(folder / "bench.json")]) == 0
    assert "1.00x" in capsys.readouterr().out
    for found in results["rows"]:
        if found["side"] == sides.OURS:
            found["percent_of_gemms"] /= 1.2
    (tmp_path / "bench.json").write_text(json.dumps(results))
    assert main(["bench", "compare", str(folder), str(tmp_path)]) == 1
    assert "slower: var_kernels, training: 1.20 times the time" in capsys.readouterr().out
    assert main(["bench", "compare", str(folder), str(tmp_path), "--tolerance", "0.3"]) == 0
    results["about"]["tokens"] = 1
    (tmp_path / "bench.json").write_text(json.dumps(results))
    assert main(["bench", "compare", str(folder), str(tmp_path)]) == 2
    assert f"both runs must have the same tokens, got {TOKENS} and 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--masked", "1"], "--masked must be at least 0 and below 1, got 1"),
        (["--model", "no-such-model"], "--model must be a known model"),
        (["compare", "a"], "expected no word, or `compare A B`, got 'compare a'"),
        (["compare", "/nonexistent", "/nonexistent"], "must name the bench.json of a run or its folder"),
    ],
)
def test_bad_input_is_named(words, reason, capsys, tmp_path):
    assert main(["bench", *words, *([] if "compare" in words else ["--output", str(tmp_path / "out")])]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
