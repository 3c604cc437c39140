"""Heads and losses that are not understood are refused before anything runs, with class, reason and remedy."""

import functools
import types

import pytest
import torch
from torch import nn

from tests.hf_compare import assert_close, assert_no_logits, own_and_fused
from tests.hf_zoo import VOCAB, Case, batch, build, llama
from var_kernels.integrations.hf import capture, fused_lm_head, token_logprobs

transformers = pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")


def assert_refused(model, *words, error=ValueError, inputs=None):
    """Both entry points say the words, and the model is as it was."""
    before = set(vars(model))
    inputs = inputs or batch()
    for use in (lambda: token_logprobs(model, inputs), lambda: fused_lm_head(model).apply()):
        with pytest.raises(error) as caught:
            use()
        for word in words:
            assert word in str(caught.value)
    assert set(vars(model)) == before


def with_head(head):
    model = build(LLAMA)
    model.lm_head = head
    return model


def after_head(change):
    """A Llama whose forward ends with ``logits = change(logits)``."""

    class Changed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = change(out.logits)
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
            return out

    return Changed(transformers.LlamaConfig(**LLAMA.config)).eval()


# ---- the head --------------------------------------------------------------------------------------------------------


def test_not_a_language_model():
    with pytest.raises(TypeError, match="get_output_embeddings"):
        token_logprobs(nn.Linear(3, 3), batch())
    with pytest.raises(TypeError, match=r"model must be a loaded model \(nn.Module\), got str; load it first"):
        fused_lm_head("gpt2")


def test_a_fused_head_that_is_never_applied_is_warned_about(recwarn):
    model = build(LLAMA)
    fused_lm_head(model)
    assert "neither entered nor applied" in str(recwarn.pop(UserWarning).message)
    with fused_lm_head(model):
        pass
    fused_lm_head(model).apply().restore()
    assert not [warning for warning in recwarn if "fused_lm_head" in str(warning.message)]


def test_model_without_a_head():
    config = transformers.LlamaConfig(**LLAMA.config)
    assert_refused(
        transformers.LlamaModel(config), "LlamaModel", "have an output embedding", "load it by AutoModelForCausalLM"
    )


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(32, VOCAB)), nn.Embedding(VOCAB, 32), nn.ModuleList([nn.Linear(32, VOCAB)])],
    ids=lambda head: type(head).__name__,
)
def test_head_that_is_no_linear(head):
    assert_refused(with_head(head), "LlamaForCausalLM", "nn.Linear", type(head).__name__)


class Rounds(nn.Linear):
    def forward(self, x):
        return super().forward(x.bfloat16().float())


class Drops(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Normalises(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x, dim=-1), nn.functional.normalize(self.weight, dim=-1))


class Clips(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-20, 20))


class Adds(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1e-3


OTHER_HEADS = [Rounds, Drops, Normalises, Clips, Adds]


@pytest.mark.parametrize("head", OTHER_HEADS, ids=lambda head: head.__name__)
def test_head_whose_class_computes_something_else(head):
    assert_refused(
        with_head(head(32, VOCAB, bias=False)),
        "LlamaForCausalLM",
        f": {head.forward.__qualname__}, in train",
        "W h + b",
        "logits",
    )


@pytest.mark.parametrize("head", OTHER_HEADS, ids=lambda head: head.__name__)
def test_head_whose_forward_was_replaced(head):
    model = build(LLAMA)
    class_of = type(model.lm_head)
    model.lm_head.__class__ = head  # for super()
    model.lm_head.forward = types.MethodType(head.forward, model.lm_head)
    assert issubclass(head, class_of)
    with pytest.raises(ValueError, match=rf"must compute W h \+ b.*{head.__name__}\.forward"):
        fused_lm_head(model).apply()


@pytest.mark.parametrize("kind", ["another head's", "a partial", "a function of torch"])
def test_head_whose_forward_is_torchs_own_of_something_else(kind):
    model, other = build(LLAMA), nn.Linear(32, VOCAB, bias=False)
    forwards = {"another head's": other.forward, "a function of torch": nn.functional.normalize}
    forwards["a partial"] = functools.partial(nn.functional.linear, weight=2 * model.lm_head.weight)
    model.lm_head.forward = forwards[kind]
    with pytest.raises(ValueError, match=r"must compute W h \+ b"):
        token_logprobs(model, batch())


def test_head_whose_forward_is_replaced_while_it_is_fused():
    model = build(LLAMA)
    with fused_lm_head(model):
        assert model(**batch()).loss > 0
        model.lm_head.forward = lambda x: 2 * nn.functional.linear(x, model.lm_head.weight)
        for use in (lambda: model(**batch()), lambda: token_logprobs(model, batch())):
            with pytest.raises(ValueError, match=r"must compute W h \+ b, got a Linear"):
                use()
        del model.lm_head.forward
        assert model(**batch()).loss > 0


def test_head_under_an_adapter_whose_forward_was_replaced():
    peft = pytest.importorskip("peft")
    for part in ("", "base_layer", "lora_B.default"):
        config = peft.LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
        model = peft.get_peft_model(build(LLAMA), config).eval()
        module = model.get_output_embeddings().get_submodule(part)
        plain = module.forward
        module.forward = lambda x, plain=plain: 2 * plain(x)
        with pytest.raises(ValueError, match=r"must compute W h \+ b"):
            token_logprobs(model, batch())


def in_fp32(self, x):
    return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)


class Logged(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("kind", ["in fp32", "a subclass", "weight_norm", "parametrized", "hooked"])
def test_heads_that_are_a_product_all_the_same(kind):
    model = build(LLAMA)
    head = model.lm_head
    if kind == "in fp32":
        head.forward = types.MethodType(in_fp32, head)
    elif kind == "a subclass":
        model.lm_head = Logged(32, VOCAB, bias=False)
    elif kind == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(head)
    elif kind == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(head, "weight", Halved())
    else:
        head.register_forward_pre_hook(lambda _module, args: (nn.functional.normalize(args[0], dim=-1),))
        head.register_forward_hook(lambda _module, _args, output: 3 * output)
    with torch.autocast("cpu", torch.bfloat16):  # which rounds any head's output
        fused_lm_head(model).apply().restore()
    own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_hook_on_the_head_that_comes_while_it_is_fused():
    model = build(LLAMA)
    with fused_lm_head(model):
        plain = model(**batch()).loss.item()
        handle = model.lm_head.register_forward_hook(lambda _module, _args, output: 3 * output)
        hooked = model(**batch()).loss.item()
        handle.remove()
        assert model(**batch()).loss.item() == plain
    model.lm_head.register_forward_hook(lambda _module, _args, output: 3 * output)
    assert hooked == pytest.approx(model(**batch()).loss.item(), rel=2**-17) != pytest.approx(plain, rel=1e-3)


def test_head_with_a_packed_weight():
    head = nn.Linear(32, VOCAB, bias=False)
    head.weight = nn.Parameter(torch.zeros(VOCAB, 32, dtype=torch.int8), requires_grad=False)
    assert_refused(with_head(head), "torch.int8", "quantised", "dequantise")


# ---- what follows the head -------------------------------------------------------------------------------------------


def test_several_prediction_streams():
    config = transformers.ProphetNetConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_decoder_layers=1,
        num_decoder_attention_heads=4,
        decoder_ffn_dim=48,
        ngram=2,
    )
    config.is_encoder_decoder = False
    assert_refused(
        transformers.ProphetNetForCausalLM(config).eval(), "ProphetNetForCausalLM", "several prediction streams"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + torch.linspace(0, 1, z.shape[-1]).to(z),
        lambda z: z.index_fill(-1, torch.tensor([7]), -1e4) if z.shape[-1] > 7 else z,
        lambda z: z.log_softmax(-1),
        lambda z: z.flip(-1),
        lambda z: z.clamp(-5, 5),
        lambda z: z * 0.0,
        lambda z: z[:, -1:],
        lambda z: torch.cat([z, z], -1),
    ],
    ids=["bias", "masked id", "log_softmax", "permuted", "clamped", "zero", "last position", "wider"],
)
def test_operation_outside_the_family(change):
    assert_refused(after_head(change), "Changed cannot be used with a fused lm_head", "instead")


@pytest.mark.parametrize(
    ("change", "scale", "softcap", "vocab"),
    [
        (lambda z: z * -0.25, -0.25, None, VOCAB),
        (lambda z: 0.5 * 20 * torch.tanh(3 * z / 20), 1.5, 10.0, VOCAB),
        (lambda z: z[..., :90].float(), 1.0, None, 90),
    ],
    ids=["negative scale", "scale after softcap", "slice"],
)
def test_operation_inside_the_family_is_taken(change, scale, softcap, vocab):
    from var_kernels.integrations.hf.calibration import calibrate

    model = after_head(change)
    found = calibrate(model)
    assert found.logit_scale == pytest.approx(scale, rel=1e-5)
    assert found.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-5))
    assert found.vocab == vocab
    inputs = batch()
    inputs["labels"] = inputs["labels"].clamp(max=vocab - 1)
    labels = inputs["labels"][:, 1:]
    logp = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(-1)
    truth = logp[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels != -100, 0.0)
    assert (token_logprobs(model, inputs)[:, 1:] - truth).abs().max() <= 1e-5


def test_head_called_twice():
    class Twice(transformers.LlamaForCausalLM):
        def forward(self, **kwargs):
            super().forward(**kwargs)
            return super().forward(**kwargs)

    assert_refused(Twice(transformers.LlamaConfig(**LLAMA.config)), "Twice", "2 times")


def test_head_not_called():
    class Bypass(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            return {"logits": nn.functional.linear(hidden, self.lm_head.weight)}

    assert_refused(Bypass(transformers.LlamaConfig(**LLAMA.config)), "Bypass", "0 times")


def test_model_that_cannot_run_on_input_ids_alone():
    class Needy(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, codebooks=None, **kwargs):
            return super().forward(input_ids=input_ids + codebooks[0], **kwargs)

    model = Needy(transformers.LlamaConfig(**LLAMA.config))
    with pytest.raises(ValueError, match=r"Needy.*trial forward pass.*TypeError"):
        token_logprobs(model, batch())
    with fused_lm_head(model), pytest.raises(ValueError, match=r"Needy.*trial forward pass.*TypeError"):
        model(**batch())
    assert "forward" not in vars(model)


# ---- the loss, and causality -----------------------------------------------------------------------------------------


def own_loss(loss):
    class OwnLoss(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            if labels is not None:
                out.loss = loss(out.logits, labels)
            return out

    return OwnLoss(transformers.LlamaConfig(**LLAMA.config)).eval()


def cross_entropy(logits, labels, **options):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def test_loss_computed_inline_is_replaced():
    model = own_loss(cross_entropy)
    expected = model(**batch()).loss.item()
    with fused_lm_head(model):
        out = model(**batch())
    assert_no_logits(out.logits)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_z_loss_of_bamba():
    case = llama("BambaForCausalLM", attn_layer_indices=[1], z_loss_coefficient=1e-3, mamba_n_heads=8, mamba_d_head=8)
    case.config.update(mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16)
    model = build(case)
    own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)
    model.z_loss_coefficient = 0.0
    with fused_lm_head(model):
        assert model(**batch()).loss > 0


def test_bidirectional_model_has_no_token_logprobs():
    config = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = build(Case("BertLMHeadModel", {**config, "intermediate_size": 48, "is_decoder": False}))
    with pytest.raises(ValueError, match=r"BertLMHeadModel is not causal.*is_decoder = True"):
        token_logprobs(model, batch())
    model = build(Case("BertLMHeadModel", {**config, "intermediate_size": 48, "is_decoder": True}))
    assert token_logprobs(model, batch()).isfinite().all()


# ---- the batch -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build(LLAMA)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b: b["input_ids"], TypeError, "mapping"),
        (lambda b: {"labels": b["labels"]}, TypeError, "input_ids"),
        (lambda b: {**b, "labels": b["labels"][:, 1:]}, ValueError, r"\(3, 11\).*\(3, 10\).*not shifted"),
        (lambda b: {**b, "labels": b["labels"].float()}, TypeError, "int64"),
        (lambda b: {**b, "logits_to_keep": 4}, ValueError, r"\(3, 4\).*\(3, 11\).*logits_to_keep"),
        (lambda b: {**b, "labels": b["labels"].clamp(min=VOCAB)}, ValueError, rf"labels must be in \[0, {VOCAB}\)"),
    ],
    ids=["tensor", "no input_ids", "shifted labels", "float labels", "logits_to_keep", "label out of range"],
)
def test_bad_batch(model, change, error, words):
    with pytest.raises(error, match=words):
        token_logprobs(model, change(batch()))
    assert "forward" not in vars(model.lm_head)


def test_logits_to_keep_with_the_fused_loss(model):
    with fused_lm_head(model), pytest.raises(ValueError, match="logits_to_keep"):
        model(**batch(), logits_to_keep=4)
    assert model(**batch()).loss > 0


def test_another_ignore_index(model):
    with fused_lm_head(model), pytest.raises(ValueError, match=r"ignore_index.*-100"):
        model(**batch(), ignore_index=0)


def test_capture_where_the_model_skips_its_head(model):
    class Skips(transformers.LlamaForCausalLM):
        skip = False

        def forward(self, input_ids=None, **kwargs):
            if self.skip:
                return self.model(input_ids=input_ids)
            return super().forward(input_ids=input_ids, **kwargs)

    skips = Skips(transformers.LlamaConfig(**LLAMA.config))
    inputs = {"input_ids": batch()["input_ids"]}
    capture(skips, lambda hidden, head: hidden.sum(), inputs)
    skips.skip = True
    with pytest.raises(ValueError, match="must call its output embedding in this forward pass, and did not"):
        capture(skips, lambda hidden, head: hidden.sum(), inputs)
