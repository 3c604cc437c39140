"""``var-kernels memory``: what it predicts is what is measured, to a tenth."""

import json

import pytest
import torch
import torch.nn.functional as F

from var_kernels import linear_logprob, linear_weighted_nll
from var_kernels.cli import main
from var_kernels.cli.heads import KNOWN, find_head_size
from var_kernels.cli.memory import predict
from var_kernels.measure import peak_extra_bytes
from var_kernels.ops.backend import choose_backend, use_backend

SHAPES = [(512, 64, 20000), (256, 256, 12000), (1024, 32, 8000), (128, 512, 9000)]


@pytest.mark.parametrize("workspace_mb", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predictions_are_what_is_measured(shape, dtype, workspace_mb):
    n, d, v = shape
    if dtype == torch.float16:
        v //= 4  # CPUs multiply it slowly
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    losses = {
        "plain": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels),
        "weighted": lambda: linear_weighted_nll(hidden, weight, labels, None, workspace_mb=workspace_mb),
        "general": lambda: linear_logprob(hidden, weight, labels, workspace_mb=workspace_mb).sum(),
    }
    predicted = predict(n, d, v, dtype, torch.device("cpu"), workspace_mb)._asdict()
    for name, loss in losses.items():
        measured = peak_extra_bytes(lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight)))
        # In fp16, and in plain torch, sums and a block's temporaries are counted as if all, or none, lived at once.
        exact = name == "plain" or (dtype != torch.float16 and choose_backend(hidden.device, dtype)[0] == "native")
        least, most = (0.9, 1.1) if exact else (0.6, 3.0)
        assert least * measured <= predicted[name] <= most * measured, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_loss_of_transformers_takes_as_much(dtype):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8000, **sizes)).to(dtype)
    ids = torch.randint(8000, (2, 256))
    measured = peak_extra_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert predict(ids.numel(), 16, 8000, dtype, torch.device("cpu")).plain == pytest.approx(measured, rel=0.05)


def test_nothing_large_is_allocated():
    predicted = predict(1 << 20, 1 << 13, 1 << 18, torch.bfloat16, torch.device("cpu"), 4096)
    assert predicted.plain > 100 * predicted.weighted


def test_the_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "vocab_size": 270}))
    with use_backend("torch"):
        assert main(["memory", "--model", str(tmp_path / "config.json"), "--batch-size", "4", "--length", "1024"]) == 0
    printed = capsys.readouterr().out
    assert "4096 rows (batch 4 x 1024 tokens), hidden 32, vocabulary 270" in printed
    assert f"about {12 * 4096 * 270 / 2**20:,.0f} MiB" in printed


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected --model, or --hidden and --vocab, got neither"),
        (["--model", "gpt-2", "--hidden", "8", "--vocab", "9"], "got both"),
        (["--hidden", "8"], "--hidden needs --vocab too"),
        (["--model", "qwen4"], "got 'qwen4'; known are Qwen3-4B"),
    ],
)
def test_bad_input_is_named(words, reason, capsys):
    assert main(["memory", *words]) == 2
    assert reason in capsys.readouterr().err


# Classes whose default configuration is that of the published model.
DEFAULTS = {
    "GPT-2": "GPT2Config",
    "Llama-2-7B": "LlamaConfig",
    "Mixtral-8x7B": "MixtralConfig",
    "Gemma-2-2B": "Gemma2Config",
    "Phi-3-mini": "Phi3Config",
    "GPT-OSS-20B": "GptOssConfig",
    "DeepSeek-V3": "DeepseekV3Config",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_known_heads_are_those_of_transformers(name):
    config = getattr(pytest.importorskip("transformers"), DEFAULTS[name])()
    assert KNOWN[name] == (config.hidden_size, config.vocab_size)
    assert find_head_size(name.upper())[1:3] == KNOWN[name]
