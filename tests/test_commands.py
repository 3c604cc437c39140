"""Every command of the README and of docs/: the tests that run it, or why none does; those of ``train`` run here."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.test_docs import PAGES, ROOT
from tests.tiny_training import ROWS, tiny_model, tokenizer
from var_kernels.cli import main

# First pattern that a command matches -> the test file that runs it, or the reason why none does.
RUN_BY = {
    r"var-kernels train|torchrun .* train|accelerate launch": "tests/test_commands.py",
    r"var-kernels bench": "tests/test_bench_command.py",
    r"var-kernels memory": "tests/test_memory_command.py",
    r"var-kernels (methods|doctor)": "tests/test_doctor_and_methods.py",
    r"make demo": "tests/test_demo.py",
    r"make (setup|test|lint|docs)|source ": "every change runs them",
    r"make bench|python -m benchmarks\.cpu_losses": "tests/test_bench.py",
    r"make study": "tests/test_study.py",
    r"make wheel": "tests/test_packaging.py",
    r"make matrix": "by hand: downloads some GB; tests/test_packaging.py reads what it wrote",
    r"make sanitize": "tests/test_selftest.py",
    r"python benchmarks/memory\.py": "tests/test_readme.py",
    r"python benchmarks/estimators\.py": "by hand: a minute; tests/test_readme.py reads what it wrote",
    r"python benchmarks/ess\.py|python -m benchmarks\.real": "by hand: needs a file or a model that is not here",
    r"python -m benchmarks\.cpu_kernels": "by hand: minutes",
    r"python benchmarks/compile_kernels\.py": "tests/test_offline_compile.py",
    r"python -m benchmarks\.gpu_costs": "tests/test_gpu_costs.py",
    r"python benchmarks/gpu_(report|plots)\.py": "tests/test_gpu_run.py",
    r"(\w+=\S+ )*benchmarks/gpu_run\.sh": "tests/test_gpu_run.py",
    r"benchmarks/fetch_peers\.sh": "by hand: downloads",
    r"python examples/compare_models\.py": "tests/test_compare_models.py",
    r"(\.venv/bin/)?pip install|git clone|mkdir|for lam": "by hand: installs, downloads, loops",
}
COMMAND = re.compile(
    r"^((?:\w+=\S+ |taskset -c \d+ )*)((?:\.venv/bin/)?(?:var-kernels|python|make|pip|torchrun|accelerate)"
    r"|benchmarks/\S+\.sh|git clone|mkdir|source|for lam)\b"
)


def commands():
    for page, text in PAGES.items():
        plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
        for line in re.findall(r"^ {4,8}(\S.*)$", plain, re.MULTILINE):
            if COMMAND.match(line) and not line.startswith("var-kernels train:"):
                yield page, re.sub(r"^(OMP_NUM_THREADS=1 )?(taskset -c 1 )?", "", line)


def test_every_command_has_its_tests_or_a_reason():
    used = set()
    found = list(commands())
    assert len(found) > 60
    for page, line in found:
        pattern = next((pattern for pattern in RUN_BY if re.match(pattern, line)), None)
        assert pattern, f"{page}: nothing runs `{line}`: name its tests, or the reason why there are none"
        used.add(pattern)
    assert used == set(RUN_BY)
    for by in RUN_BY.values():
        assert not by.startswith("tests/") or (ROOT / by).is_file(), by


# -- train -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a judge, and data under the names that the pages use."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer()), num_labels=1, pad_token_id=2, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder / "judge")
    for name in ("model", "judge"):
        tokenizer().save_pretrained(folder / name)
    pairs = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in ROWS]
    prompts = [{"prompt": row["prompt"]} for row in ROWS]
    files = {"rows": ROWS, "data": ROWS, "rewards": ROWS, "pairs": pairs, "held_out": pairs, "prompts": prompts}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(
        "def score(prompts, completions):\n    return [1.0 * len(c) for c in completions]\n"
    )
    return folder


def train_commands():
    launch = (ROOT / "examples" / "launch" / "README.md").read_text()
    given = re.search(r'^    TRAIN="(.*)"$', launch, re.MULTILINE)[1]
    for page, line in (*commands(), ("examples/launch", f"torchrun {given}")):
        words = shlex.split(line, comments=True)
        if "train" in words and RUN_BY[next(p for p in RUN_BY if re.match(p, line))] == "tests/test_commands.py":
            yield pytest.param(words[words.index("train") + 1 :], id=f"{page}: {' '.join(words)}"[:110])


@pytest.mark.parametrize("words", list(train_commands()))
def test_train_commands_run_dry(words, folder, tmp_path, monkeypatch, capsys):
    """As they stand, but for the model, a short ``max_length`` and the CPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    words = [word for word in words if word not in ("...", "--bf16") and word != "$TRAIN"]
    names = {
        "NAME": "model",
        "NAME_OR_PATH": "model",
        "Qwen/Qwen3-0.6B": "model",
        "STUDENT": "model",
        "TEACHER": "model",
    }
    names |= {"runs/judge": "judge"}
    words = [str(folder / names[word]) if word in names else word.replace("$lam", "0.3") for word in words]
    words = [
        str(folder / word.removesuffix(".gz")) if re.fullmatch(r"\w+\.jsonl(\.gz)?", word) else word for word in words
    ]
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    if "--from-scratch" not in words and "--model" not in words:
        words += ["--model", str(folder / "model")]
    if "--dataset" not in words:
        words += ["--dataset", str(folder / "rows.jsonl")]
    short = ["--max-length", "48", "--per-device-train-batch-size", "2", "--use-cpu"]
    online = ["--max-new-tokens", "8"] if "--online" in words or any("online.yaml" in word for word in words) else []
    assert main(["train", *words, *short, *online, "--dry-run"]) == 0, capsys.readouterr().err
    assert "dry run of method" in capsys.readouterr().out
    assert list(Path.cwd().iterdir()) == []
