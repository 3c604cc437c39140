"""``var-kernels bench``: figures that hang together, and the comparison of two runs."""

import base64
import json
import re

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from var_kernels.cli import main
from var_kernels.cli.bench import sides
from var_kernels.cli.bench.measure import BARE, MODES

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
        words = ["--model", str(folder), "--tokens", str(TOKENS), "--masked", "0.25", "--seconds", "0"]
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
    assert "no kernel image" in (folder / "bench.html").read_text()


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
        (["compare", "/nonexistent", "/nonexistent"], "expected the bench.json of a run or its folder"),
    ],
)
def test_bad_input_is_named(words, reason, capsys, tmp_path):
    assert main(["bench", *words, *([] if "compare" in words else ["--output", str(tmp_path / "out")])]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
