"""Bad input to training: what the message says, and that nothing is left behind."""

import errno
import json
import os
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from tests.tiny_training import ROWS, tiny_config, tiny_model, tiny_trainer, tokenizer
from var_kernels.cli import main
from var_kernels.integrations.data import DataError, load_examples
from var_kernels.integrations.trainer import VARConfig, VARTrainer

GOOD_LINE = json.dumps(ROWS[0])


def tree(folder) -> set[str]:
    return {
        os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files
    } | {os.path.relpath(os.path.join(root, name), folder) for root, folders, _ in os.walk(folder) for name in folders}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory with a good data set, from which the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


BASE = {
    "from-scratch": "hidden=16,layers=1,heads=2,vocab=270",
    "dataset": "rows.jsonl",
    "output-dir": "run",
    "max-length": "32",
    "max-steps": "1",
}


def chat_rows(path):
    message = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"prompt": message, "completion": message, "reward": 1}))


def latin_1(path):
    path.write_bytes("reward: gewürze:punkte".encode("latin-1"))


def cut_model(path):
    tiny_model().save_pretrained(path)
    os.truncate(path / "model.safetensors", 100)


# name: (options over BASE, None taking one away; files to write first; what the message must say)
COMMAND_LINES = {
    "no data set": ({"dataset": None}, {}, "--dataset must be given, got none: .json, .jsonl (also .gz)"),
    "no output": ({"output-dir": None}, {}, "--output-dir must be given, got none: where checkpoints"),
    "no model": ({"from-scratch": None}, {}, "give one of --model and --from-scratch, got neither"),
    "two models": ({"model": "gpt2"}, {}, "give one of --model and --from-scratch, got both"),
    "no number": ({"learning-rate": "fast"}, {}, "train: --learning-rate must be of type float, got 'fast'"),
    "no whole number": ({"seed": "1.5"}, {}, "train: --seed must be of type int, got '1.5'"),
    "no value": ({"lam": True}, {}, "lam must be of type float, got True (a flag without a value)"),
    "unknown option": ({"lerning-rate": "1"}, {}, "unknown option --lerning-rate, did you mean --learning-rate?"),
    "an option like no other": ({"packing": True}, {}, "unknown option --packing; --help and"),
    "a tracker that is not installed": ({"report-to": "azure_ml"}, {}, "report-to: AzureMLCallback requires"),
    "unknown key in YAML": ({"config": "c.yaml"}, {"c.yaml": "lamb: 3"}, "unknown option --lamb, did you mean --lam?"),
    "YAML that is none": ({"config": "c.yaml"}, {"c.yaml": "a: [1"}, "config must be YAML, got c.yaml; correct"),
    "YAML of a list": ({"config": "c.yaml"}, {"c.yaml": "- 1"}, "c.yaml must hold 'name: value' lines, got a list"),
    "wrong type in YAML": ({"config": "c.yaml"}, {"c.yaml": "lam: much"}, "lam must be of type float, got 'much'"),
    "YAML of another encoding": ({"config": "c.yaml"}, {"c.yaml": latin_1}, "config must be UTF-8, got c.yaml with"),
    "no such YAML": ({"config": "none.yaml"}, {}, "config must be an existing YAML file, got none.yaml"),
    "stray word": ({"bf16": "false stray"}, {}, "the one value of the option before it, got 'stray'"),
    "bad field value": ({"weight-decay": "heavy"}, {}, "weight_decay must be of type float, got 'heavy'"),
    "unknown method": (
        {"method": "sail"},
        {},
        "method must be one that `var-kernels methods` lists, got 'sail', did you mean sail_pr?",
    ),
    "unknown normalizer": ({"normalizer": "none"}, {}, "normalizer must be one of 'batch',"),
    "cross": ({"normalizer": "cross"}, {}, "in the trainer, got 'cross', which needs the reference's score"),
    "unknown reference": ({"reference": "total"}, {}, "reference must be one of 'sum', 'mean', 'none', got 'total'"),
    "lam of 0": ({"lam": "0"}, {}, "lam must be > 0"),
    "beta of 0": ({"method": "dpo", "beta": "0"}, {}, "beta must be finite and > 0, got 0.0"),
    "another method's option": ({"beta": "1"}, {}, "--beta is no option of method 'var'; it belongs to"),
    "unknown reduction": ({"method": "ipo", "token-reduction": "all"}, {}, "one of 'sum', 'mean', got 'all'"),
    "no room": ({"max-length": "1"}, {}, "max_length must be >= 2 tokens, got 1"),
    "negative rate": ({"learning-rate": "-1"}, {}, "learning_rate must be finite and >= 0, got -1.0"),
    "not a number": ({"weight-decay": "nan"}, {}, "weight_decay must be a number, got nan; write one, or leave it out"),
    "endless rate": ({"learning-rate": "inf"}, {}, "learning_rate must be finite and >= 0, got inf"),
    "endless epochs": ({"max-steps": "-1", "epochs": "inf"}, {}, "num_train_epochs must be finite and > 0, got inf"),
    "an unknown level": ({"log-level": "loud"}, {}, "log_level must be one of detail, debug, info,"),
    "a checkpoint by its path": (
        {"resume-from-checkpoint": "run/checkpoint-1"},
        {},
        "resume-from-checkpoint must be left out, got run/checkpoint-1; --resume goes on",
    ),
    "a beta of 1": ({"adam-beta2": "1"}, {}, "adam_beta2 must be >= 0 and < 1, got 1.0"),
    "no epsilon": ({"adam-epsilon": "0"}, {}, "adam_epsilon must be finite and > 0, got 0.0"),
    "negative decay": ({"weight-decay": "-1"}, {}, "weight_decay must be finite and >= 0, got -1.0"),
    "fewer than no workers": ({"dataloader-num-workers": "-1"}, {}, "dataloader_num_workers must be >= 0, got -1"),
    "empty batch": ({"per-device-train-batch-size": "0"}, {}, "per_device_train_batch_size must be >= 1, got 0"),
    "no step": ({"max-steps": "0"}, {}, "max_steps must be >= 1, or -1 for num_train_epochs, got 0"),
    "no accumulation": ({"gradient-accumulation-steps": "0"}, {}, "gradient_accumulation_steps must be >= 1"),
    "no option of the schedule": (
        {"lr-scheduler-kwargs": '{"bad":1}'},
        {},
        "lr-scheduler-kwargs must be JSON of the options of 'linear', such as {\"num_cycles\": 2}, got {'bad': 1}",
    ),
    "a hub that is not there": ({"push-to-hub": True}, {}, "push-to-hub: no repository could be made on the hub ("),
    "optimiser's options": ({"optim-args": "bad"}, {}, "optim-args must be key=value,key=value, got 'bad'"),
    "smoothed labels": ({"label-smoothing-factor": "0.1"}, {}, "label_smoothing_factor must be 0, got 0.1"),
    "sampling by length": (
        {"train-sampling-strategy": "group_by_length"},
        {},
        "train_sampling_strategy must be 'random' or 'sequential', got 'group_by_length'",
    ),
    "a model that is nowhere": (
        {"from-scratch": None, "model": "nobody/nothing"},
        {},
        "model must be a folder with a model in it, or the name of one on the hub, got nobody/nothing; check",
    ),
    "negative workspace": ({"workspace-mb": "-3"}, {}, "workspace_mb must be finite and > 0, or None, got -3.0"),
    "unknown SFT set": ({"method": "sft", "sft-on": "worst"}, {}, "sft_on must be one of 'best', 'all', got 'worst'"),
    "moving precomputed reference": ({"sync-ref-model": True}, {}, "pass precompute_ref_log_probs=False"),
    "no such file": ({"dataset": "none.jsonl"}, {}, "dataset must be an existing file or a name on the hub, got none"),
    "a directory": ({"dataset": "."}, {}, "or a name on the hub, got the folder .; name a file in it"),
    "an unknown ending": ({"dataset": "rows.csv"}, {"rows.csv": "a,b"}, "dataset must have one of the endings .json,"),
    "an empty file": ({"dataset": "e.jsonl"}, {"e.jsonl": ""}, "e.jsonl: must hold at least one row, got none"),
    "no Parquet file": ({"dataset": "p.parquet"}, {"p.parquet": "x"}, "p.parquet: cannot be read as a Parquet file"),
    "malformed rows": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": GOOD_LINE + '\n{"prompt": "p", "completions": ["a"], "rewards": [1, 2]}\n'},
        "m.jsonl:2: rewards must have one entry per completion, 1, got 2",
    ),
    "nothing but malformed rows": (
        {"dataset": "m.jsonl", "skip-malformed": True},
        {"m.jsonl": '{"prompt": "p"}\n'},
        "no other row is left to use",
    ),
    "malformed evaluation": (
        {"eval-dataset": "m.jsonl", "eval-strategy": "epoch"},
        {"m.jsonl": "[]\n"},
        "m.jsonl: must hold at least one row, got none",
    ),
    "evaluation at no time": ({"eval-dataset": "rows.jsonl"}, {}, "eval-dataset must be given with an evaluation"),
    "evaluation of nothing": ({"eval-strategy": "epoch"}, {}, "eval-strategy: epoch needs --eval-dataset, got none"),
    "a split of nothing": ({"eval-split": "test"}, {}, "eval-split needs --eval-dataset, got none; name"),
    "a split of a file": (
        {"split": "test"},
        {},
        "split must be unset for a local file, which is read whole, got 'test' with rows.jsonl",
    ),
    "a cut line": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": GOOD_LINE + '\n{"prompt": \n'},
        "train: m.jsonl:2: not JSON: Expecting value at column 11; mend what is malformed",
    ),
    "two arrays": (
        {"dataset": "m.json"},
        {"m.json": f"[{GOOD_LINE}]\n\n[{GOOD_LINE}]\n"},
        "m.json:3: not JSON: expected nothing after the array, got '[{",
    ),
    "unknown dtype": ({"from-scratch": None, "model": ".", "dtype": "fp8"}, {}, "dtype must be float32, bfloat16,"),
    "a dtype from scratch": ({"dtype": "bfloat16"}, {}, "dtype: a model from scratch is in float32, got 'bfloat16'"),
    "a folder without a model": (
        {"from-scratch": None, "model": "."},
        {},
        "model must be a causal LM that transformers can load, got .; check its config.json and weights: ",
    ),
    "weights cut short": (
        {"from-scratch": None, "model": "cut"},
        {"cut": cut_model},
        "model must be a causal LM that transformers can load, got cut; check its config.json and weights: Error while",
    ),
    "a teacher's weights cut short": (
        {"method": "distill", "teacher": "cut"},
        {"cut": cut_model},
        "teacher must be a causal LM that transformers can load, got cut; check",
    ),
    "no teacher": ({"method": "distill", "teacher": "./none"}, {}, "teacher must be an existing folder or a name on"),
    "no folder of a reward model": ({"reward-model": "./none"}, {}, "reward model must be an existing folder"),
    "no reward model": ({"reward-model": "nobody/nothing"}, {}, "reward-model must be a folder with a model"),
    "VAR without rewards": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": '{"prompt": "p", "chosen": "a", "rejected": "b"}'},
        "m.jsonl:1: chosen_reward and rejected_reward must be in the data, since this method needs rewards",
    ),
    "pairs without rewards": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": '{"prompt": "p", "chosen": "a", "rejected": "b"}'},
        "got the keys ['chosen', 'prompt', 'rejected']; add it, or pass a reward function (--reward); pairs without",
    ),
    "other columns": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": '{"question": "p", "answer": "a", "score": 1}\n' * 3},
        "m.jsonl:1: a row must have prompt (prompt + completion + reward | ",
    ),
    "one column of another name": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": '{"prompt": "p", "answer": "a", "reward": 1}'},
        "got ['answer', 'prompt', 'reward']; --columns completion=NAME",
    ),
    "a column that is not there": (
        {"dataset": "m.jsonl", "columns": "prompt=query"},
        {"m.jsonl": '{"question": "p", "completion": "a", "reward": 1}'},
        "m.jsonl:1: columns must name keys of the row, ['completion', 'question', 'reward'], got 'query'",
    ),
    "columns that are no pairs": ({"columns": "prompt"}, {}, "columns must be WANTED=NAME,WANTED=NAME, got 'prompt'"),
    "a column twice": ({"columns": "prompt=a,prompt=b"}, {}, "columns must be WANTED=NAME,WANTED=NAME"),
    "a normalizer that is nearly one": (
        {"normalizer": "groups"},
        {},
        "normalizer must be one of 'batch', 'batch_mean', 'group', 'self_normalised', got 'groups'",
    ),
    "a reference term that self_normalised has not": (
        {"reference": "mean"},
        {},
        "reference must be 'none' for normalizer='self_normalised', got 'mean'; drop it, or take normalizer='group'",
    ),
    "VAR's option for another method": ({"method": "dpo", "lam": "1"}, {}, "--lam is no option of method 'dpo'"),
    "rewards without effect": (
        {"dataset": "m.jsonl", "normalizer": "group"},
        {"m.jsonl": "".join(f'{{"prompt": "p{i}", "completion": "a", "reward": {i}}}\n' for i in range(3))},
        "train: train_dataset: rewards would have no effect: 3 of 3 prompts have a single completion, and method 'var'",
    ),
    "DPO without a difference": (
        {"dataset": "m.jsonl", "method": "dpo"},
        {"m.jsonl": '{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 1]}'},
        "method 'dpo' needs pairs: no prompt has two completions with different rewards",
    ),
    "messages without a template": (
        {"dataset": "m.jsonl"},
        {"m.jsonl": chat_rows},
        "from-scratch: the data must be plain text, since a new tokenizer has no chat template",
    ),
    "no such model": ({"from-scratch": None, "model": "./none"}, {}, "model must be an existing folder"),
    "unknown size": ({"from-scratch": "hiden=8"}, {}, "got 'hiden', did you mean hidden?"),
    "size of another type": ({"from-scratch": "hidden=big"}, {}, "from-scratch: hidden must be int, got 'big'"),
    "size without value": ({"from-scratch": "hidden"}, {}, "from-scratch must be key=value,key=value, got 'hidden'"),
    "odd heads": ({"from-scratch": "hidden=16,heads=3"}, {}, "from-scratch: hidden must be a multiple of 2 x heads"),
    "no layers": ({"from-scratch": "layers=0"}, {}, "from-scratch: layers must be at least 1, got 0"),
    "small vocabulary": ({"from-scratch": "vocab=100"}, {}, "vocab_size must be at least 259"),
    "unknown LoRA key": ({"lora": "rank=8"}, {}, "lora: a key must be one of r, alpha, dropout, targets, got 'rank'"),
    "LoRA of rank 0": ({"lora": "r=0"}, {}, "lora: r must be at least 1, got 0"),
    "reward without colon": ({"reward": "json"}, {}, "reward must be module:function, got 'json'"),
    "reward of no module": ({"reward": "no_such_module:f"}, {}, "reward must name a module that can be imported"),
    "reward of no function": ({"reward": "json:f"}, {}, "reward: module 'json' must have a function 'f', got none"),
    "output is a file": ({"output-dir": "rows.jsonl"}, {}, "output-dir must be a folder, got the file rows.jsonl"),
    "output in a file": ({"output-dir": "rows.jsonl/run"}, {}, "output-dir must be a folder, got the file rows.jsonl"),
    "output in no place": ({"output-dir": "/proc/none"}, {}, "/proc/none: No such file or directory"),
}


@pytest.mark.parametrize(("options", "files", "message"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_the_command_refuses_says_why_and_leaves_nothing(options, files, message, folder, capsys, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / f"{folder.name}-hf"))
    for name, content in files.items():
        content(folder / name) if callable(content) else (folder / name).write_text(content)
    before = tree(folder)
    words = ["train"]
    for name, value in {**BASE, **options}.items():
        if value is not None:
            words += [f"--{name}"] + ([] if value is True else value.split(" "))
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("var-kernels train: ")
    assert tree(folder) == before


def test_a_run_is_not_written_over(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    before = tree(folder)
    assert main(["train", *(word for name, value in BASE.items() for word in (f"--{name}", value))]) == 2
    assert "already holds a run: --resume continues it" in capsys.readouterr().err
    assert tree(folder) == before


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["docter"]) == 2
    assert "unknown command 'docter', did you mean doctor?" in capsys.readouterr().err
    assert main(["memory", "--modle", "x"]) == 2
    assert "unknown option --modle, did you mean --model?" in capsys.readouterr().err
    assert main(["memory", "--length", "0"]) == 2
    assert "--length must be at least 1, got 0" in capsys.readouterr().err
    assert main(["memory", "--length", "long"]) == 2
    assert capsys.readouterr().err == "var-kernels memory: --length must be at least 1, got long\n"
    for words, message in (
        (["--length", "²"], "--length must be at least 1, got ²"),
        (["--length", "9" * 12], "--length must be less than 2^31, got 999999999999"),
        (
            ["--length", "2147483647", "--batch-size", "2147483647"],
            "batch-size x length x vocab must be less than 2^60",
        ),
        *((["--workspace-mb", bad], "workspace_mb must be 0 or positive (MiB), got") for bad in ("inf", "nan", "-3")),
    ):
        assert main(["memory", "--hidden", "64", "--vocab", "500", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["memory", "--model", "nobody/nothing"]) == 2
    assert capsys.readouterr().err.startswith("var-kernels memory: model must be a folder with a model in it")


def test_a_full_disk_is_named_with_the_way_on(folder, capsys, monkeypatch):
    from var_kernels.cli import train

    raised = []

    def save_model(self, *args, **options):
        if not raised:
            shutil.rmtree("run")
        raise raised.pop() if raised else FileNotFoundError("run/model.safetensors")

    monkeypatch.setattr(VARTrainer, "save_model", save_model)
    words = ["train", *(word for name, value in BASE.items() for word in (f"--{name}", value))]
    raised.append(RuntimeError("no write"))
    with pytest.raises(RuntimeError, match="no write"):
        main(words)
    unwritten = r"a file in run could not be written whole; see the quota .*"
    cases = [
        (RuntimeError("[enforce fail at inline_container.cc:672]"), unwritten),  # torch.save, by a limit of the size
        (OSError(errno.EDQUOT, "Disk quota exceeded"), unwritten),
        (None, "run was removed while training ran; put it back"),
    ]
    for error, reason in cases:
        raised.extend([error] if error else [])
        assert main([*words, "--resume"]) == 2
        assert re.search(f"output-dir: {reason}, and --resume goes on from", capsys.readouterr().err)
    raised.append(OSError(errno.ENOSPC, "No space left on device"))  # of standard output: the folder's disk has room
    assert main([*words, "--resume"]) == 2
    assert "output-dir" not in capsys.readouterr().err
    raised.append(RuntimeError("basic_ios::clear: iostream error"))
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4096}))
    assert main([*words, "--resume"]) == 2
    assert "output-dir: no space left on the disk of run; make room, and --resume goes on" in capsys.readouterr().err


def test_a_folder_without_permission_is_refused(folder, capsys, monkeypatch):
    from var_kernels.cli import train

    monkeypatch.setattr(train.os, "access", lambda path, mode: False)  # who runs as root may write anywhere
    assert main(["train", *(word for name, value in BASE.items() for word in (f"--{name}", value))]) == 2
    message = "output-dir must be writable, got . without the permission; choose another"
    assert capsys.readouterr().err == f"var-kernels train: {message}\n"


# ---- the Python interface --------------------------------------------------------------------------------------------


def encoder_model():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=270, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )


def without_eos():
    import copy

    bare = copy.deepcopy(tokenizer())
    bare.eos_token = None
    return bare


TRAINERS = {
    "not a VARConfig": (
        lambda f: VARTrainer(tiny_model(), {"lam": 1}, ROWS),
        TypeError,
        "args must be a VARConfig or a method_config",
    ),
    "a name for rows": (
        lambda f: VARTrainer(tiny_model(), tiny_config(f), "rows.jsonl", processing_class=tokenizer()),
        TypeError,
        "train_dataset must be rows, got the name 'rows.jsonl'",
    ),
    "all splits": (
        lambda f: tiny_trainer(f, {"train": ROWS, "test": ROWS}),
        TypeError,
        "train_dataset must be rows, .* got a dict of train, test; pass one split of a DatasetDict",
    ),
    "a number": (lambda f: tiny_trainer(f, 5), TypeError, "train_dataset must be rows, .* got a int; pass"),
    "no rows": (lambda f: tiny_trainer(f, []), DataError, "train_dataset: must hold at least one row, got none"),
    "a malformed row": (
        lambda f: tiny_trainer(f, [*ROWS, {"prompt": "p"}]),
        DataError,
        "train_dataset row 9: a row must have the keys prompt",
    ),
    "examples without rewards": (
        lambda f: tiny_trainer(f, _pairs(f)),
        DataError,
        "pairs.json:1: rewards must be in the data, since this method needs rewards, got none",
    ),
    "a small model": (
        lambda f: tiny_trainer(f, model=_shrunk_model()),
        ValueError,
        "the tokenizer must have at most 100 tokens, the embedding rows of the model, got 270",
    ),
    "a small reference": (
        lambda f: tiny_trainer(f, trainer_options={"ref_model": _shrunk_model()}),
        ValueError,
        "the tokenizer must have at most 100 tokens, the embedding rows of the ref_model, got 270",
    ),
    "a model from nowhere without a tokenizer": (
        lambda f: VARTrainer(tiny_model(), tiny_config(f), ROWS),
        ValueError,
        "processing_class must be a tokenizer, got none, with a model that has no name or path",
    ),
    "no end of sequence": (
        lambda f: VARTrainer(tiny_model(), tiny_config(f), ROWS, processing_class=without_eos()),
        ValueError,
        "the tokenizer must have an end-of-sequence token",
    ),
    "no language model": (
        lambda f: tiny_trainer(f, model=encoder_model()),
        ValueError,
        "output embedding",
    ),
    "unused columns removed": (
        lambda f: VARConfig(str(f / "run"), remove_unused_columns=True),
        ValueError,
        "remove_unused_columns must be False",
    ),
    "no batch left": (
        lambda f: tiny_trainer(f, ROWS[:2], dataloader_drop_last=True),
        ValueError,
        "dataloader_drop_last must be False where 6 items are less than a batch of all processes, 8, got True",
    ),
    "a frozen model": (
        lambda f: tiny_trainer(f, model=tiny_model().requires_grad_(False)),
        ValueError,
        "model must have parameters that require a gradient, got a LlamaForCausalLM with all of them frozen",
    ),
    "a moving reference of an adapter": (
        lambda f: tiny_trainer(
            f, precompute_ref_log_probs=False, sync_ref_model=True, trainer_options={"peft_config": object()}
        ),
        ValueError,
        "sync_ref_model must be False with peft_config, where the reference is the model without its adapter",
    ),
}


def _pairs(folder):
    path = folder / "pairs.json"
    if not path.exists():
        path.write_text('[{"prompt": "p", "chosen": "a", "rejected": "b"}]')
    return load_examples(path)[0]


def _shrunk_model():
    model = tiny_model()
    model.resize_token_embeddings(100)
    return model


@pytest.mark.parametrize(("build", "kind", "message"), TRAINERS.values(), ids=TRAINERS)
def test_the_trainer_refuses_before_anything_is_written(build, kind, message, folder):
    _pairs(folder)
    before = tree(folder)
    with pytest.raises(kind, match=message):
        build(folder)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_is_cut_short_is_named(name, folder):
    tiny_trainer(folder, save_strategy="steps", save_steps=1).train()
    checkpoint = folder / "run" / "checkpoint-1"
    os.truncate(checkpoint / name, 50)
    with pytest.raises(ValueError, match=r"checkpoint must be whole, .* got .*checkpoint-1; give those"):
        tiny_trainer(folder, max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_method_is_refused(folder):
    tiny_trainer(folder, save_strategy="steps", save_steps=1).train()
    checkpoint = folder / "run" / "checkpoint-1"
    before = tree(folder)
    with pytest.raises(ValueError, match=r"method must be 'var', that of the run whose checkpoint .* got 'sft'"):
        tiny_trainer(folder, method="sft", max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert tree(folder) == before

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["MetricsFile"]  # as older versions saved it
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    tiny_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=str(checkpoint))
    assert (folder / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_optimizer_is_named(name, folder):
    """Trainer goes on with new moments, and at the schedule's beginning."""
    tiny_trainer(folder, save_strategy="steps", save_steps=1).train()
    checkpoint = folder / "run" / "checkpoint-1"
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"got .*checkpoint-1; .* it holds no {name[:-3]}, .* begin a new one from"):
        tiny_trainer(folder, max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_reference_that_overflows_names_its_rows_and_caches_nothing(folder):
    model = tiny_model()
    before = tree(folder)
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.raises(DataError, match=r"train_dataset row 1: the reference model's log-prob must be finite, got"):
        tiny_trainer(folder, model=model)
    assert tree(folder) == before
