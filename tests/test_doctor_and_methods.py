"""What a newcomer asks of the command line: what is installed and missing, what the machine has, what a batch needs,
which methods there are."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.ranks import HANG
from var_kernels import __version__, integrations, linear_weighted_nll, machine
from var_kernels.cli import doctor, main, methods
from var_kernels.kernels import rows_native
from var_kernels.ops import backend

ROOT = Path(__file__).parents[1]


# Runs code in processes in which packages are not installed, forked from one that has imported torch, which needs none.
WITHOUT = """
import json, os, sys
import torch
for number, (packages, code) in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        assert not set(packages) & set(sys.modules), "torch imports them"
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.modules.update(dict.fromkeys(packages))
        exec(code)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


# ---- names of the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["-m", "var_kernels", "-V"], ["-m", "var_kernels.cli", "--version"]])
def test_the_module_is_the_command(words):
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    assert (run.returncode, run.stdout) == (0, f"var-kernels {__version__}\n")


# ---- what is not installed -------------------------------------------------------------------------------------------


def test_every_package_of_an_extra_is_known():
    """By the name that is imported; the others of ``dev`` are for this project's own work."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"pyyaml": "yaml", "pytest-benchmark": "pytest_benchmark"}
    for extra in ("hf", "gguf", "trl", "deepspeed", "bench"):
        for requirement in extras[extra]:
            name = re.match(r"[\w-]+", requirement)[0]
            if name != "var-kernels":
                assert integrations.EXTRAS[modules.get(name, name)] in (extra, "hf"), requirement


TORCH_ALONE = (
    "methods",
    "methods grpo",
    "methods --markdown",
    "doctor",
    "memory --hidden 64 --vocab 1000",
    "memory --model qwen3-4b",
)
MISSING = {
    "train --model m --dataset d.jsonl --output-dir o": "transformers",
    "train --config c.yaml": "yaml",
    "memory --model ./": "transformers",
    "bench": "rich",
}
TRAINER = "from var_kernels.integrations.trainer import VARTrainer"


@pytest.fixture(scope="module")
def without_packages(tmp_path_factory):
    """(exit status, standard error) by command: of ``TORCH_ALONE`` without every extra, of ``MISSING`` without one."""
    folder = tmp_path_factory.mktemp("without")
    commands = {words: list(integrations.EXTRAS) for words in TORCH_ALONE}
    commands |= {words: [package] for words, package in MISSING.items()}
    programs = [
        (packages, f"from var_kernels.cli import main; sys.exit(main({words.split()!r}))")
        for words, packages in commands.items()
    ]
    programs.append((list(integrations.EXTRAS), TRAINER))
    command = [sys.executable, "-c", WITHOUT, json.dumps(programs), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    assert run.returncode == 0, run.stderr
    codes = [int(line) for line in run.stdout.splitlines()]
    return {
        name: (code, (folder / f"{number}.err").read_text())
        for number, (name, code) in enumerate(zip([*commands, TRAINER], codes, strict=True))
    }


@pytest.mark.parametrize("words", TORCH_ALONE)
def test_runs_with_torch_alone(words, without_packages):
    assert without_packages[words] == (0, "")


@pytest.mark.parametrize("words", MISSING)
def test_a_missing_package_is_named_with_its_command(words, without_packages):
    package, command = MISSING[words], words.split()[0]
    wanted = f"var-kernels {command}: {package} is not installed; pip install -e '{ROOT}[hf]'\n"
    assert without_packages[words] == (2, wanted)


def test_the_trainer_names_its_extra_too(without_packages):
    _, said = without_packages[TRAINER]
    assert f"ModuleNotFoundError: transformers is not installed; pip install -e '{ROOT}[hf]'" in said


def test_an_installed_package_names_its_requirements(monkeypatch, tmp_path):
    """No index has to have this project, and there may be no checkout."""
    monkeypatch.setattr(integrations, "__file__", str(tmp_path / "a" / "b" / "c" / "__init__.py"))
    lines = [
        "torch>=2.11",
        'transformers>=5.0; extra == "hf"',
        'var-kernels[hf]; extra == "trl"',
        'trl>=1; extra == "trl"',
    ]
    monkeypatch.setattr(integrations.importlib.metadata, "requires", lambda name: lines)
    assert integrations.install_command("hf") == "pip install 'transformers>=5.0'"
    assert integrations.install_command("trl") == "pip install 'transformers>=5.0' 'trl>=1'"


# ---- what the machine has --------------------------------------------------------------------------------------------


def printed(capsys, *words) -> str:
    assert main(["doctor", *words]) == 0
    return capsys.readouterr().out


def test_doctor_begins_with_its_own_version_and_names_the_machine(capsys):
    lines = printed(capsys).splitlines()
    assert lines[0].split()[:2] == ["var-kernels", __version__]
    said = dict(line.split(maxsplit=1) for line in lines if line[:1] != " ")
    threads = doctor.count(torch.get_num_threads(), "thread")
    assert said["processor"].endswith(f"{doctor.count(machine.cores(), 'core')}, torch uses {threads}")
    assert re.match(r"\d+\.\d GiB", said["memory"])


def test_systems_that_say_less(monkeypatch):
    """A Mac has no /proc, Windows has neither that nor sysconf, affinity and load."""
    monkeypatch.setattr(machine, "_lines", lambda path: [])
    total = doctor.os.sysconf("SC_PHYS_PAGES") * doctor.os.sysconf("SC_PAGE_SIZE") / 2**30
    assert doctor.memory_line() == f"{total:.1f} GiB"
    for name in ("sysconf", "sched_getaffinity", "getloadavg"):
        monkeypatch.delattr(doctor.os, name)
    assert doctor.memory_line() == "not known on this system"
    assert machine.cores() >= 1
    assert doctor.load_lines(4) == []
    assert machine.processor()


def groups(folder: Path, own: str, **files) -> dict:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return {"mounts": folder, "own": folder / "own"}


def test_a_quota_is_the_lowest_of_the_groups_around(tmp_path):
    files = {"cpuDOTmax": "max 100000\n", "a__cpuDOTmax": "150000 100000\n", "a__b__cpuDOTmax": "400000 100000\n"}
    where = groups(tmp_path, "0::/a/b\n", **files, a__memoryDOTmax="1000\n", a__b__memoryDOTmax="max\n")
    assert machine.cpu_quota(**where) == 1.5
    assert machine.memory_limit(**where) == 1000


def test_a_quota_of_the_first_version_of_control_groups(tmp_path):
    files = {"cpu__x__cpuDOTcfs_quota_us": "50000\n", "cpu__x__cpuDOTcfs_period_us": "100000\n"}
    files |= {"cpu__cpuDOTcfs_quota_us": "-1\n", "cpu__cpuDOTcfs_period_us": "100000\n"}
    where = groups(
        tmp_path, "4:memory:/y\n2:cpu,cpuacct:/x\n1:cpuset:/\n", **files, memory__y__memoryDOTlimit_in_bytes="9"
    )
    assert machine.cpu_quota(**where) == 0.5
    assert machine.memory_limit(**where) == 9


@pytest.mark.parametrize("own", ["0::/\n", "1:cpu:/nothing\n", "", "no group\n", "0:\n"])
def test_no_quota(tmp_path, own):
    where = groups(tmp_path, own, cpuDOTmax="max 100000\n", memoryDOTmax="much\n")
    assert machine.cpu_quota(**where) is None
    assert machine.memory_limit(**where) is None


def test_threads_beyond_a_quota_or_on_a_busy_machine_get_a_remedy(monkeypatch):
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.1, 0, 0))
    busy, quota = doctor.load_lines(4)
    assert busy == "0.1 processes on 4 cores over the last minute"
    assert quota == "a quota of 1.5 CPUs, fewer than the threads: set OMP_NUM_THREADS=1"
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (3.0, 0, 0))
    assert "OMP_WAIT_POLICY=passive" in doctor.load_lines(4)[1]
    assert "OMP_WAIT_POLICY=passive" not in " ".join(doctor.load_lines(1))


# ---- what a batch needs ----------------------------------------------------------------------------------------------


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_methods_are_listed_by_the_data_that_they_need(capsys):
    from var_kernels.integrations.trainer.methods import METHODS
    from var_kernels.losses import VARIANTS

    assert main(["methods"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    listed = {part.splitlines()[0]: [line.split()[0] for line in part.splitlines()[1:]] for part in parts}
    assert sorted(name for names in list(listed.values())[:6] for name in names) == sorted(METHODS)
    assert set(list(listed.values())[6]) == set(VARIANTS)
    by_columns = {re.search(r"\(([^()]*)\):$", head)[1]: names for head, names in list(listed.items())[:6]}
    assert {"var", "grpo", "exo"} <= set(by_columns["prompt, completions, rewards"])
    assert {"dpo", "ipo", "bradley_terry"} <= set(by_columns["prompt, chosen, rejected"])
    assert {"sft", "dft"} <= set(by_columns["prompt, completion"])
    assert {"alol", "dro"} <= set(by_columns["prompt, completion, reward"])


def test_every_symbol_of_a_formula_is_explained():
    """By the legend, by the formula itself, or as an option of the method; what is left is mathematics and prose."""
    from var_kernels.integrations.trainer.methods import METHODS

    legend = set(re.findall(r"[\w+]+", " ".join(methods.SYMBOLS)))
    left = set()
    for method in METHODS.values():
        defined = set(re.findall(r"([\w+]+) = ", method.loss.formula))
        for symbol in re.findall(r"\b[A-Za-z]\w*\+?", method.loss.formula):
            stem = re.sub(r"_(w|l|t|target|last)\b", "", symbol)
            explained = legend | defined | set(method.own_settings) | set(METHODS)
            left |= {symbol} - explained if {stem, stem.rstrip("+"), symbol} & explained == set() else set()
    mathematics = "mean std exp log logit relu sigmoid softmax softmax_k min max clip sum_t"
    given = "var_weights rewards ref_logp low high"
    prose = """a and any at by completion completions constant default desirable each else for head highest if its last
    means most of or others over per prompt reward sign sum summed sums the token where"""
    assert left <= set(f"{mathematics} {given} {prose}".split())


# ---- without the C++ kernels -----------------------------------------------------------------------------------------


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(rows_native, "obstacle", lambda: "the C++ extension is not built")
    monkeypatch.setattr(backend, "_warned", False)
    monkeypatch.delenv("VAR_KERNELS_BACKEND", raising=False)


def loss_of(rows: int, vocab: int, dtype=torch.float32) -> None:
    labels = torch.zeros(rows, dtype=torch.int64)
    linear_weighted_nll(torch.ones(rows, 2, dtype=dtype), torch.ones(vocab, 2, dtype=dtype), labels, None)


def test_plain_torch_is_said_once_with_the_remedy(not_built):
    with pytest.warns(backend.PlainTorchWarning, match="not built") as caught:
        loss_of(1024, 4096)
    assert rows_native.BUILD_COMMAND in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(1024, 4096)


@pytest.mark.parametrize("case", ["small", "fp64", "forced", "forced by the environment", "most rows ignored", "built"])
def test_no_warning(case, not_built, monkeypatch):
    if case == "built":
        monkeypatch.setattr(rows_native, "obstacle", lambda: None)
        monkeypatch.setattr(backend, "choose_backend", lambda *_: ("torch", ""))
    if case == "forced by the environment":
        monkeypatch.setenv("VAR_KERNELS_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "forced":
            with backend.use_backend("torch"):
                loss_of(1024, 4096)
        elif case == "most rows ignored":
            labels = torch.full((1024,), -100)
            labels[0] = 1
            linear_weighted_nll(torch.ones(1024, 2), torch.ones(4096, 2), labels, None)
        elif case == "built":
            backend.warn_in_plain_torch(torch.device("cpu"), torch.bfloat16, 1 << 30)
        else:
            loss_of(1024, 4095 if case == "small" else 4096, torch.float64 if case == "fp64" else torch.float32)
