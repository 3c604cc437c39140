"""The configurations of examples/launch: accelerate reads them, and two CPU ranks train under each as one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.ranks import HANG, as_accelerators, compile_nothing, run_ranks
from tests.tiny_training import ROWS
from var_kernels.cli import main

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "examples" / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
SPREAD = ["fsdp2.yaml", *(["zero3.yaml"] if importlib.util.find_spec("deepspeed") else [])]
LOGGED = ("loss", "ess", "log_z", "reward_mean", "nll_per_token", "kl_to_ref")


def launch_environment(name, *options):
    """What ``accelerate launch`` gives each rank, and its arguments."""
    words = ["--config_file", str(LAUNCH / name), *options, "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        given = list(load_config_from_file(str(LAUNCH / name)).deepspeed_config)
        args.deepspeed_fields_from_accelerate_config = ",".join(given)  # as the launcher does
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return args, {key: value for key, value in environment.items() if os.environ.get(key) != value}


def words_for(folder, data):
    options = {
        "dataset": data, "output-dir": folder / "run", "cache-dir": folder / "cache", "num-train-epochs": 2,
        "from-scratch": "hidden=24,layers=2,heads=2,vocab=270", "max-length": 32, "learning-rate": 1e-2,
        "logging-steps": 1, "save-steps": 2, "seed": 3, "lr-scheduler-type": "constant", "disable-tqdm": "true",
        "lam": 0.5, "normalizer": "batch", "reference": "mean",
    }  # fmt: skip
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: entry[key] for key in LOGGED} for entry in map(json.loads, lines) if "loss" in entry]


def assert_same_curve(made, wanted):
    assert len(made) == len(wanted) == 6
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    assert main([*words_for(folder, data), "--per-device-train-batch-size", "10", "--use-cpu"]) == 0
    return folder


# ---- what accelerate makes of the files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_knows_every_key(name):
    config = load_config_from_file(str(LAUNCH / name))
    assert config.num_processes == (32 if config.num_machines == 4 else 8)
    if name.startswith("zero3") and not importlib.util.find_spec("deepspeed"):
        return  # its launcher asks for the package
    args, environment = launch_environment(name)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name.startswith("fsdp2"):
        wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
        assert wanted.items() <= environment.items()
    if name.startswith("zero3"):
        wanted = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
        assert wanted.items() <= environment.items()
    if "nodes" in name:
        assert (args.nnodes, args.nproc_per_node) == ("4", "8")


def test_the_readme_names_every_file():
    text = (LAUNCH / "README.md").read_text()
    assert all(f"examples/launch/{name}" in text for name in CONFIGS)


# ---- real runs ------------------------------------------------------------------------------------------------------


def run_rank(rank, world, folder, data, *more):
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        compile_nothing()
    words = [*words_for(folder, data), "--per-device-train-batch-size", "5", "--ddp-backend", "gloo"]
    with as_accelerators():
        assert main([*words, *more]) == 0


@pytest.mark.parametrize("name", SPREAD)
def test_two_ranks_under_the_configuration_train_as_one_process(name, data, one_process, tmp_path):
    from transformers import AutoModelForCausalLM

    _, environment = launch_environment(name, "--num_processes", "2", "--mixed_precision", "no")
    environment |= {"DS_ACCELERATOR": "cpu", "VAR_KERNELS_TRACEBACK": "1"}
    run_ranks(run_rank, 2, tmp_path, data, environment=environment)
    straight = logged(tmp_path / "run")
    if name == "fsdp2.yaml":  # once more from the middle
        for checkpoint in ("checkpoint-4", "checkpoint-6"):
            shutil.rmtree(tmp_path / "run" / checkpoint)
        run_ranks(run_rank, 2, tmp_path, data, "--resume", environment=environment)
        assert logged(tmp_path / "run") == straight
    assert_same_curve(logged(tmp_path / "run"), logged(one_process / "run"))
    made, wanted = (AutoModelForCausalLM.from_pretrained(folder / "run") for folder in (tmp_path, one_process))
    for ours, theirs in zip(made.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_accelerate_launch_starts_two_ranks(data, one_process, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp.yaml"), "--num_processes", "2"]
    options = ["--mixed_precision", "no", "--main_process_port", "0", "-m", "var_kernels.cli"]
    words = [*words_for(tmp_path, data), "--per-device-train-batch-size", "5", "--use-cpu", "--ddp-backend", "gloo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *launcher, *options, *words],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "saved to" in run.stdout
    assert (tmp_path / "run" / "checkpoint-6" / "rng_state_1.pth").exists()
    assert_same_curve(logged(tmp_path / "run"), logged(one_process / "run"))
