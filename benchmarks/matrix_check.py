"""What an installed var_kernels must do, without this checkout: python -I matrix_check.py INTERPRETER PACKAGE...

Prints JSON: the packages' versions, and of each check "right" or its error; a check whose package is not there is left
out. Each runs in a process of its own, since Triton's interpreter is chosen at import. INTERPRETER is the path of
tests/triton_interpreter.py.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def command(_interpreter):
    """The installed command, and that the package is the installed one."""
    import var_kernels

    assert "site-packages" in var_kernels.__file__, var_kernels.__file__
    script = Path(sys.executable).with_name("var-kernels")
    for words in (["doctor"], ["methods"]):
        done = subprocess.run([script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr or done.stdout


def fp64(_interpreter):
    """Log-probs and gradients, fp32 and bf16, by every backend of this machine."""
    from var_kernels.cli.doctor import check_against_fp64
    from var_kernels.kernels import rows_native
    from var_kernels.ops.backend import use_backend

    obstacle = rows_native.obstacle()
    native = importlib.util.find_spec("var_kernels.kernels._native") is not None
    assert not (native and obstacle), obstacle
    for backend in ("torch", "native") if native else ("torch",):
        with use_backend(backend):
            verdict = check_against_fp64()
        assert verdict.startswith("right"), f"{backend}: {verdict}"


def interpreter(path):
    """The same by the Triton kernels, interpreted."""
    import triton  # noqa: F401

    from var_kernels.cli.doctor import check_against_fp64
    from var_kernels.ops.backend import use_backend

    spec = importlib.util.spec_from_file_location("triton_interpreter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.mend()
    with use_backend("triton"):
        verdict = check_against_fp64()
    assert verdict.startswith("right"), verdict


def _model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=507, **sizes))


def training(_interpreter):
    """Two steps of SGD of a small Llama, by its own loss and by the fused one: the same losses and parameters."""
    import torch

    from var_kernels.integrations.hf import fused_lm_head

    ids = torch.randint(507, (2, 31), generator=torch.Generator().manual_seed(1))
    results = []
    for head in (contextlib.nullcontext, fused_lm_head):
        model = _model()
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        with head(model) if head is fused_lm_head else head():
            for _ in range(2):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                sgd.step()
                sgd.zero_grad()
                losses.append(loss.detach())
        results.append((torch.stack(losses), torch.nn.utils.parameters_to_vector(model.parameters())))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2**-15, atol=2**-17)


def var_trainer(_interpreter):
    """Two steps of `var-kernels train` on a model from scratch, with an adapter."""
    row = {"prompt": "2 + 2 =", "completions": [" 4", " 5"], "rewards": [1.0, 0.0]}
    script = Path(sys.executable).with_name("var-kernels")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text(8 * (json.dumps(row) + "\n"))
        words = [
            "train",
            "--from-scratch",
            "hidden=32,layers=1,heads=2,vocab=280",
            "--dataset",
            "rows.jsonl",
            "--use-cpu",
        ]
        words += ["--max-steps", "2", "--lora", "r=4", "--output-dir", "run"]
        done = subprocess.run([script, *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (Path(folder) / "run" / "adapter_model.safetensors").exists()


def compiled(_interpreter):
    """torch.compile in one graph gives the op's log-probs and gradients."""
    import torch

    from var_kernels import linear_logprob

    def loss(hidden, weight, labels):
        return linear_logprob(2 * hidden, weight, labels).square().mean()

    torch.manual_seed(0)
    labels = torch.randint(507, (63,))
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((63, 72), (507, 72))]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        value = function(*leaves, labels)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2**-15, atol=2**-17)


def sft_trainer(_interpreter):
    """Two steps of TRL's SFTTrainer, with the mixin and without: the same losses."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from var_kernels.integrations.from_scratch import train_tokenizer
    from var_kernels.integrations.trl import FusedHeadMixin

    class FusedTrainer(FusedHeadMixin, SFTTrainer):
        pass

    rows = [{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a in range(4) for b in range(4)]
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], 280)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    results = []
    for trainer in (SFTTrainer, FusedTrainer):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **{name: getattr(tokenizer, name) for name in names})
        with tempfile.TemporaryDirectory() as folder:
            settings = {"max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
            arguments = SFTConfig(folder, **settings, bf16=False, use_cpu=True, learning_rate=1e-2)
            made = trainer(
                model=LlamaForCausalLM(config),
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            made.train()
        results.append(torch.tensor([entry["loss"] for entry in made.state.log_history if "loss" in entry]))
    torch.testing.assert_close(results[1], results[0], rtol=2**-10, atol=0)  # the trainer rounds what it logs


NEEDS = {
    "interpreter": ("triton", "numpy"),
    "training": ("transformers",),
    "VARTrainer": ("transformers",),
    "SFTTrainer": ("trl",),
}
CHECKS = {check.__name__: check for check in (command, fp64, interpreter, training, compiled)}
CHECKS |= {"VARTrainer": var_trainer, "SFTTrainer": sft_trainer}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _outcome(name: str, path: str) -> str:
    environment = dict(os.environ, HF_HUB_OFFLINE="1")
    if name == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    words = [sys.executable, "-I", __file__, path, "--check", name]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    return "right" if done.returncode == 0 else (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]


def main(path: str, words: list[str]) -> None:
    if words[:1] == ["--check"]:
        with contextlib.redirect_stdout(io.StringIO()):
            CHECKS[words[1]](path)
        return
    found = {package: _version(package) for package in words}
    for name in CHECKS:
        if all(map(_version, NEEDS.get(name, ()))):
            found[name] = _outcome(name, path)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
