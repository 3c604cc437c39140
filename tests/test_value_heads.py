"""The heads beside the lm_head: their numbers, files, and life inside a transformers model."""

import json
import logging
import stat

import pytest
import torch
from torch.nn.functional import mse_loss

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from var_kernels.integrations.hf import capture
from var_kernels.integrations.hf.heads import RewardHead, ValueHead, attach_head, load_head
from var_kernels.losses.ava import ava_d_loss
from var_kernels.ops import linear_logprob

D, V = 32, 97


def tiny(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32))
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def randomised(head):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return head


def same(a, b):
    assert type(a) is type(b)
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_starts_at_the_prior():
    hidden = torch.randn(2, 3, D)
    mu, log_sigma = RewardHead(D)(hidden)
    assert mu.shape == log_sigma.shape == (2, 3)
    assert mu.count_nonzero() == log_sigma.count_nonzero() == 0
    assert ValueHead(D)(hidden).count_nonzero() == 0


def test_by_hand():
    head = RewardHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        head.bias.copy_(torch.tensor([0.5, 0.0]))
    mu, log_sigma = head(torch.tensor([[3.0, 4.0]]))
    assert (mu.item(), log_sigma.item()) == (11.5, -4.0)


def test_value_of_a_sequence():
    head = randomised(ValueHead(D, per="sequence"))
    hidden = torch.randn(3, 4, D)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    per_token = ValueHead(D)
    per_token.load_state_dict(head.state_dict())
    tokens = per_token(hidden)
    torch.testing.assert_close(head(hidden, mask), torch.stack([tokens[0, 1], tokens[1, 3], torch.tensor(0.0)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_in_fp32(dtype):
    head = randomised(RewardHead(D)).to(dtype)
    hidden = torch.randn(5, D).to(dtype).requires_grad_()
    expected = hidden.double() @ head.weight.double().T + head.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.stack(head(hidden), -1)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5
    got.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == dtype
    assert head.double()(hidden.double())[0].dtype == torch.float64


@pytest.mark.parametrize("head", [RewardHead(D), ValueHead(D), ValueHead(D, per="sequence")], ids=str)
def test_saved_and_loaded(head, tmp_path):
    randomised(head).save_pretrained(tmp_path / "new")
    loaded = load_head(tmp_path / "new", hidden_size=D)
    assert same(loaded, head)
    assert loaded.config == head.config
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["value_head.json", "value_head.safetensors"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "new").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    head = randomised(RewardHead(D))
    head.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(tensors, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        RewardHead(D).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("attach", ["attach_head", "attribute"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_does_not_notice(kind, attach, tmp_path):
    model, plain = tiny(kind).eval(), tiny(kind).eval()
    head = randomised(RewardHead(D))
    if attach == "attach_head":
        assert attach_head(model, head) is model.value_head
    else:
        model.value_head = head
    ids = torch.arange(6).view(1, 6)
    generate = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **generate), plain.generate(ids, **generate))
    model.save_pretrained(tmp_path)
    head.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
    again = attach_head(loaded, load_head(tmp_path, hidden_size=D))
    assert same(again, head)
    # saved once more, over itself, then trained on
    loaded.save_pretrained(tmp_path)
    assert same(load_head(tmp_path), head)
    assert {id(p) for p in head.parameters()} <= {id(p) for p in model.parameters()}


def test_attach_head_keeps_the_models_file_clean(tmp_path, caplog):
    from safetensors import safe_open

    model = tiny()
    attach_head(model, RewardHead(D))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "value_head" in key]  # noqa: SIM118 (no mapping)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "value_head" not in caplog.text


def test_ava_trains_policy_and_head_in_one_step():
    """Hidden states of the model's own forward: both log-probs and rewards learn."""
    model = tiny()
    attach_head(model, RewardHead(D))
    ids = torch.randint(0, V, (2, 7))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)

    def parts(hidden, params):
        logp = linear_logprob(hidden, params.lm_head_weight, labels, params.bias, **params.logit_options)
        return logp, *model.value_head(hidden)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        (logp, mu, log_sigma), _ = capture(model, parts, {"input_ids": ids})
        loss = ava_d_loss(logp, mu, log_sigma, labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.value_head.weight.grad.count_nonzero() > 0


def test_a_value_head_learns_its_target():
    torch.manual_seed(0)
    head, hidden, target = ValueHead(D), torch.randn(64, D), torch.randn(64)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = mse_loss(head(hidden), target).item()
    for _ in range(50):
        optimizer.zero_grad()
        mse_loss(head(hidden), target).backward()
        optimizer.step()
    assert mse_loss(head(hidden), target).item() < 0.8 * before


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_of_heads():
    with pytest.raises(ValueError, match="hidden_size must be a positive int, got 0"):
        RewardHead(0)
    with pytest.raises(ValueError, match="per must be one of"):
        ValueHead(D, per="batch")
    with pytest.raises(ValueError, match=r"hidden must have shape \(..., 32\), got \(3, 31\)"):
        RewardHead(D)(torch.zeros(3, 31))
    with pytest.raises(ValueError, match="mask must be None for a head per token"):
        ValueHead(D)(torch.zeros(3, 4, D), torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .* got NoneType"):
        ValueHead(D, per="sequence")(torch.zeros(3, 4, D))
    with pytest.raises(ValueError, match=r"mask must be \(B, T\).*got \(3, 5\)"):
        ValueHead(D, per="sequence")(torch.zeros(3, 4, D), torch.ones(3, 5, dtype=torch.bool))


def test_refusals_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"value_head.json must be a file of the saved head.*save_pretrained"):
        load_head(tmp_path)
    RewardHead(D).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden_size must be 64 for this model, got 32"):
        load_head(tmp_path, hidden_size=64)
    with pytest.raises(FileNotFoundError, match=r"critic.json must be a file of the saved head"):
        load_head(tmp_path, "critic")
    description = tmp_path / "value_head.json"
    description.write_text(json.dumps({"class": "ValueHead", "hidden_size": D, "per": "token"}))
    with pytest.raises(ValueError, match=r"value_head.safetensors must hold .*\(1, 32\).* got .*\(2, 32\)"):
        load_head(tmp_path)
    for wrong in ("{", '{"class": "Linear", "hidden_size": 32}', '{"class": "RewardHead"}', "[]"):
        description.write_text(wrong)
        with pytest.raises(ValueError, match="must describe a head"):
            load_head(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"value_head.safetensors must be a file"):
        load_head(tmp_path)


def test_refusals_of_attaching():
    model = tiny()
    with pytest.raises(ValueError, match=r"hidden_size=32, the width of LlamaForCausalLM's lm_head, got 16"):
        attach_head(model, RewardHead(16))
    with pytest.raises(ValueError, match=r"has an attribute 'lm_head'"):
        attach_head(model, RewardHead(D), "lm_head")
    with pytest.raises(TypeError, match="model must be a transformers model"):
        attach_head(torch.nn.Linear(2, 2), RewardHead(2))
