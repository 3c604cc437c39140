"""The command line: help without torch, options from flags and YAML, training a file, dying and resuming, doctor,
bench."""

import dataclasses
import errno
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

from tests.ranks import HANG, run_alone
from tests.tiny_training import ROWS
from var_kernels.cli import main, train
from var_kernels.cli.options import coerce, key_values, pair_up
from var_kernels.integrations import from_scratch

ROOT = Path(__file__).parents[1]
SCRATCH = "hidden=16,layers=1,heads=2,vocab=270"


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(tmp_path, dataset, output="run", **options) -> list[str]:
    settings = {
        "from_scratch": SCRATCH,
        "dataset": dataset,
        "output_dir": tmp_path / output,
        "cache_dir": tmp_path / "cache",
        "max_length": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    result = ["train"]
    for name, value in settings.items():
        result += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return result


def metrics(tmp_path, output="run") -> list[dict]:
    entries = [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom var_kernels.cli import main\n"
        "for words in ([], ['--help'], ['--version']): assert main(words) == 0\n"
        "for command in ('train', 'doctor', 'bench'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules), 'heavy import'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "align a causal LM by VAR" in result.stdout
    assert "--from-scratch" in result.stdout


def test_the_defaults_that_help_shows_are_the_configs():
    from var_kernels.integrations.trainer import VARConfig

    fields = {field.name: field for field in dataclasses.fields(VARConfig)}
    for name, (_, default, _) in train._CONFIG.items():
        if name == "report_to":
            continue  # VARConfig's "none", which needs no word of help
        assert default == fields[name].default, name


def test_a_file_is_trained_as_it_is(tmp_path, dataset, capsys):
    assert main(words(tmp_path, dataset, max_steps=30, normalizer="group")) == 0
    entries = metrics(tmp_path)
    assert entries[-1]["loss"] < 0.7 * entries[0]["loss"]
    assert {"ess", "log_z", "weight_entropy", "reward_mean", "weighted_reward", "kl_to_ref"} <= set(entries[-1])
    assert {"tokens_per_second", "peak_memory_mb", "learning_rate", "grad_norm"} <= set(entries[-1])
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.jsonl"} <= made
    assert "saved to" in capsys.readouterr().out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.decode(tokenizer(ROWS[0]["prompt"])["input_ids"]) == "<bos>" + ROWS[0]["prompt"]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_resuming_a_finished_run_leaves_its_numbers(tmp_path, dataset):
    """As a job that is started again would: no third step, no summary of a training of no steps."""
    options = words(tmp_path, dataset, max_steps=2, save_steps=1, lr_scheduler_type="constant")
    assert main(options) == 0
    files = [tmp_path / "run" / name for name in ("metrics.jsonl", "README.md", "model.safetensors")]
    before = [path.read_bytes() for path in files]
    assert main([*options, "--resume"]) == 0
    assert [path.read_bytes() for path in files] == before


def test_a_log_file_has_no_progress_bars_unless_asked_for(tmp_path, dataset, capsys, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    options = words(tmp_path, dataset, max_steps=1)
    assert main([word for word in options if word != "--disable-tqdm"]) == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err
    assert "'loss'" in printed.out
    assert main([*words(tmp_path, dataset, output="second", max_steps=1), "--disable-tqdm=false"]) == 0
    assert "1/1" in capsys.readouterr().err


def test_no_reference_term_is_none_and_not_the_default(tmp_path, dataset):
    log_z = [math.log(sum(math.exp(reward / 2.0) for reward in row["rewards"])) for row in ROWS]
    options = {"reference": "none", "normalizer": "group", "lam": 2.0, "per_device_train_batch_size": 8, "max_steps": 1}
    assert main(words(tmp_path, dataset, **options)) == 0
    assert metrics(tmp_path)[0]["log_z"] == pytest.approx(sum(log_z) / len(log_z), rel=1e-5)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_other_methods_and_a_saved_model(method, tmp_path, dataset):
    assert main(words(tmp_path, dataset, output="base", max_steps=1)) == 0
    options = words(tmp_path, dataset, method=method, model=tmp_path / "base", lora="r=2,alpha=4")
    at = options.index("--from-scratch")
    assert main(options[:at] + options[at + 2 :]) == 0
    assert len(metrics(tmp_path)) == 4
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_flags_override_yaml_and_yaml_takes_any_field(tmp_path, dataset):
    options = words(tmp_path, dataset)[1:]
    content = {}
    for name, value in zip(options[::2], options[1::2], strict=False):
        content[name[2:]] = value
    lines = [f"from-scratch: {SCRATCH}", f"dataset: {dataset}", f"output_dir: {tmp_path / 'run'}"]
    lines += ["max-length: 32", "max_steps: 9", "learning-rate: 1e-3", "lam: 2", "weight_decay: 0.5", "use_cpu: true"]
    lines += [f"cache_dir: {tmp_path / 'cache'}", "disable_tqdm: true", "normalizer: group", "logging-steps: 1"]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    assert main(["train", "--config", str(tmp_path / "train.yaml"), "--max-steps", "2", "--adam-beta1=0.5"]) == 0
    import torch

    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert (args.max_steps, args.learning_rate, args.lam, args.weight_decay) == (2, 1e-3, 2.0, 0.5)
    assert (args.adam_beta1, args.normalizer) == (0.5, "group")
    assert len(metrics(tmp_path)) == 2


def test_the_example_config_is_understood(tmp_path, dataset):
    config = ROOT / "examples" / "train_var.yaml"
    options = words(tmp_path, dataset, config=config, max_steps=2)
    assert main(options) == 0
    assert len(metrics(tmp_path)) == 2


def killed_after_12_steps(options):
    training_step = transformers.Trainer.training_step

    def killed(self, *args, **given):
        if self.state.global_step == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, *args, **given)

    transformers.Trainer.training_step = killed
    main(options)


def test_a_killed_run_resumes_to_the_same_curve(tmp_path, dataset):
    steps = {"max_steps": 40, "save_steps": 5, "save_total_limit": 2}
    assert main(words(tmp_path, dataset, output="straight", **steps)) == 0
    options = words(tmp_path, dataset, output="killed", **steps)
    process = run_alone(killed_after_12_steps, tmp_path, options)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert len(metrics(tmp_path, "killed")) == 12
    assert main([*options, "--resume"]) == 0
    straight, resumed = metrics(tmp_path, "straight"), metrics(tmp_path, "killed")
    assert [entry["step"] for entry in resumed] == list(range(1, 41))
    assert [entry["loss"] for entry in resumed] == [entry["loss"] for entry in straight]
    assert [entry["ess"] for entry in resumed] == [entry["ess"] for entry in straight]


def tied(options):
    make = from_scratch.make_model

    def make_tied(*args, **given):
        model = make(*args, **given)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    from_scratch.make_model = make_tied
    main(options)


def test_a_run_without_a_terminal_speaks_into_its_log(tmp_path, dataset):
    """What it is about to do, each line with the name; resumed, no word of weights that are tied."""
    options = words(tmp_path, dataset, save_steps=2, disable_tqdm=False)
    options.remove("False")
    options.remove("--disable-tqdm")
    made = run_alone(tied, tmp_path, options)
    assert made.returncode == 0, made.stderr
    assert "[var-kernels] scoring 24 rows (" in made.stderr
    assert "[var-kernels] method var: 8 prompts, 24 completions, 8 items; " in made.stderr
    assert "parameters; 4 steps of 4 items\n" in made.stderr
    for newest in (tmp_path / "run" / "checkpoint-4").glob("trainer_state.json"):
        newest.write_text("{")
    resumed = run_alone(tied, tmp_path, [*options, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert "4 steps of 4 items, from step 2 on\n" in resumed.stderr
    assert "missing keys" not in resumed.stderr


def test_warnings_of_the_library_stand_in_the_log_by_name(tmp_path, dataset, capsys):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    dataset.write_text("".join(json.dumps({**row, "rewards": [0.0, 0.0, 1000.0]}) + "\n" for row in rows))
    show = warnings.showwarning
    assert main(words(tmp_path, dataset)) == 0
    assert "[var-kernels] VAR weights have collapsed" in capsys.readouterr().err
    assert warnings.showwarning is show
    assert not logging.getLogger("var_kernels").handlers


def test_short_names_of_options(tmp_path, dataset, monkeypatch):
    """On the command line and in YAML, where the flag wins."""
    seen = []
    monkeypatch.setattr(train, "_check_optimisation", lambda config: seen.append(config) or sys.exit(0))
    (tmp_path / "c.yaml").write_text("lr: 0.5\nbatch-size: 3\n")
    short = ["--config", str(tmp_path / "c.yaml"), "--lr", "0.25", "--epochs", "2", "--grad-accum", "5"]
    base = [
        "train",
        "--from-scratch",
        SCRATCH,
        "--dataset",
        str(dataset),
        "--output-dir",
        str(tmp_path / "o"),
        "--use-cpu",
    ]
    with pytest.raises(SystemExit):
        main([*base, *short])
    (config,) = seen
    assert (config.learning_rate, config.num_train_epochs, config.gradient_accumulation_steps) == (0.25, 2.0, 5)
    assert config.per_device_train_batch_size == 3


def test_help_shows_the_options_of_the_default_method(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for text in ("--lam", "--normalizer", "{self_normalised,group,batch,batch_mean}", "--reference", "{none,mean,sum}"):
        assert text in shown
    assert "--lr, --batch-" in shown


def test_columns_of_other_names(tmp_path, dataset):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    names = {"prompt": "question", "completions": "answers", "rewards": "scores"}
    renamed = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = ",".join(f"{wanted}={name}" for wanted, name in names.items())
    assert main(words(tmp_path, dataset)) == 0
    assert main(words(tmp_path, other, output="other", columns=columns)) == 0
    assert [entry["loss"] for entry in metrics(tmp_path)] == [entry["loss"] for entry in metrics(tmp_path, "other")]


def test_an_interrupted_run_says_how_to_go_on(tmp_path, dataset, monkeypatch, capsys):
    from var_kernels.integrations.trainer import VARTrainer

    def interrupted(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(VARTrainer, "train", interrupted)
    assert main(words(tmp_path, dataset)) == 130
    assert "var-kernels train: interrupted; the same command with --resume goes on" in capsys.readouterr().err


def test_a_run_whose_output_nobody_reads_says_how_to_go_on(tmp_path, dataset, monkeypatch, capsys):
    """`train | head`: the command has lost more than its output."""
    from var_kernels.integrations.trainer import VARTrainer

    def broken(self, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(VARTrainer, "train", broken)
    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(words(tmp_path, dataset)) == 2
    assert "train: standard output must stay open while training runs" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("buffering", [1, -1])
def test_an_output_that_is_full_is_named(buffering, monkeypatch, capsys):
    with open("/dev/full", "w", buffering) as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["memory", "--hidden", "8", "--vocab", "100", "--length", "8"]) == 2
    assert "standard output must be writable, got 'No space left on device'" in capsys.readouterr().err


def test_letters_that_the_terminal_lacks_are_shown_by_code(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "prompt": row["prompt"] + " \u00e9"}) + "\n" for row in ROWS))
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(words(tmp_path, rows, dry_run=True)) == 0
    sys.stdout.flush()
    assert rb"\xe9" in printed.getvalue()


def test_the_home_folder_in_paths(tmp_path, dataset, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("method: dpo")
    options = {"cache_dir": "~/kept", "config": "~/run.yaml", "max_steps": 1}
    assert main(words(tmp_path, "~/rows.jsonl", **options)) == 0
    assert (tmp_path / "kept" / "ref_logp").is_dir()
    assert not (tmp_path / "~").exists()


def test_resume_skips_a_half_written_checkpoint_and_starts_anew_without_one(tmp_path, dataset, capsys):
    assert main([*words(tmp_path, dataset, save_steps=2), "--resume"]) == 0
    assert "starting anew" in capsys.readouterr().out
    newest = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    newest.write_text(newest.read_text()[:100])
    assert train.last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert main([*words(tmp_path, dataset, save_steps=2), "--resume"]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4]


def test_malformed_rows_are_counted_when_skipped(tmp_path, dataset, capsys):
    dataset.write_text(dataset.read_text() + '{"prompt": "p"}\nnot json\n')
    assert main(words(tmp_path, dataset, skip_malformed=True)) == 0
    errors = capsys.readouterr().err
    assert f"skipped {dataset}:9: a row must have the keys prompt + completion" in errors
    assert "skipped 2 malformed rows of 10" in errors


def test_what_concerns_all_ranks_is_said_once(tmp_path, monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        train._report_skipped(["row 3"], 8)
        train._checkpoint(tmp_path, resume=True)
    out, errors = capsys.readouterr()
    assert errors.splitlines() == ["skipped row 3", "skipped 1 malformed rows of 9"]
    assert out == f"no complete checkpoint in {tmp_path}: starting anew\n"


def test_rows_left_out_of_the_evaluation_set_are_counted_too(tmp_path, dataset, capsys):
    worse = tmp_path / "worse.jsonl"
    worse.write_text(dataset.read_text() + '{"prompt": "p"}\n')
    assert main(words(tmp_path, dataset, eval_dataset=worse, eval_strategy="epoch", skip_malformed=True)) == 0
    errors = capsys.readouterr().err
    assert f"skipped {worse}:9: a row must have the keys prompt + completion" in errors
    assert "skipped 1 malformed rows of 9" in errors


def test_a_reward_function_and_an_evaluation_set(tmp_path, dataset, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"reward": "my_reward:short", "eval_dataset": dataset, "eval_strategy": "steps", "eval_steps": 2}
    assert main(words(tmp_path, dataset, **options)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mean = -sum(len(c) for row in ROWS for c in row["completions"]) / 24
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert evaluated[0]["eval_reward_mean"] == pytest.approx(mean)


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_doctor_says_what_runs_and_that_it_is_right(capsys):
    import torch

    from var_kernels.ops.backend import choose_backend

    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in printed
    backend, reason = choose_backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    assert f"backend        {backend} ({reason})" in printed
    assert "self-check     right: largest relative error" in printed


def test_doctor_calls_a_wrong_kernel_wrong(capsys, monkeypatch):
    import var_kernels

    right = var_kernels.linear_logprob
    monkeypatch.setattr(var_kernels, "linear_logprob", lambda *operands: right(*operands) * 1.001)
    assert main(["doctor"]) == 1
    assert "self-check     WRONG: in float32 a relative error of 1.0e-03" in capsys.readouterr().out


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        ("1e-3", "float", 1e-3),
        (2, "float", 2.0),
        ("7", "int | None", 7),
        ("none", "float | None", None),
        ("none", "str | None", "none"),
        ("false", "bool", False),
        (True, "bool", True),
        ("steps", "transformers.IntervalStrategy | str", "steps"),
        ("{a: 1}", "dict | str | None", {"a": 1}),
        ("adamw_torch", "OptimizerNames | str", "adamw_torch"),
        ("500", "float", 500.0),
    ],
)
def test_values_take_the_declared_type(value, kind, wanted):
    made = coerce("name", value, kind)
    assert made == wanted
    assert type(made) is type(wanted)


@pytest.mark.parametrize(
    ("value", "kind"), [("fast", "float"), ("maybe", "bool"), (True, "int"), ("1.5", "int"), ([1], "str")]
)
def test_values_of_another_type_are_refused(value, kind):
    with pytest.raises(ValueError, match=f"name must be of type .*{kind}"):
        coerce("name", value, kind)


def test_words_pair_up():
    assert pair_up(["--bf16", "--seed", "3", "--a-b=c=d", "--x", "-1"]) == {
        "bf16": True,
        "seed": "3",
        "a_b": "c=d",
        "x": "-1",
    }
    with pytest.raises(ValueError, match=r"each word must be an option .* got 'stray'"):
        pair_up(["--seed", "3", "stray"])


def test_key_values():
    assert key_values("lora", "r=4, x=q+v", {"r": 8, "x": "all", "d": 0.5}) == {"r": 4, "x": "q+v", "d": 0.5}


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_do_not_spin(given):
    """The policy is in the environment before torch, which reads it, is imported; the user's own stays."""
    script = (
        "import os, sys; from var_kernels.cli import main; assert 'torch' not in sys.modules;"
        "main(['methods', 'var']); print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == (given or "PASSIVE")
