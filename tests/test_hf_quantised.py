"""Heads with packed weights: right by their dequantised weight, or refused with the remedy."""

import pytest
import torch
from torch import nn

from tests.hf_compare import assert_close, own_and_fused
from tests.hf_zoo import batch, build, llama
from tests.tolerance import assert_result
from var_kernels.integrations.hf import fused_lm_head, token_logprobs

pytest.importorskip("transformers")

VOCAB = 128  # bitsandbytes on a CPU wants multiples of 32
LLAMA = llama("LlamaForCausalLM", vocab_size=VOCAB)
WIDTH = LLAMA.config["hidden_size"]


class Packed(torch.Tensor):
    """int8 codes and a scale per row behind a floating point face, as torchao and quanto make them."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors, _, outer_size, outer_stride):
        return Packed(**tensors)

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


class RoundsItsInput(nn.Linear):
    def forward(self, hidden):
        step = hidden.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((hidden / step).round() * step, self.weight.dequantize())


def fake(cls=nn.Linear):
    weight = build(LLAMA).lm_head.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    head = cls(WIDTH, VOCAB, bias=False)
    head.weight = nn.Parameter(Packed((weight / scale).round().to(torch.int8), scale), requires_grad=False)
    return head


def torchao(config, **options):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    head = nn.Sequential(nn.Linear(WIDTH, VOCAB, bias=False))
    head[0].weight.data.copy_(build(LLAMA).lm_head.weight)
    quantization.quantize_(head, getattr(quantization, config)(**options))
    return head[0]


def bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    head = bnb.nn.Linear4bit(WIDTH, VOCAB, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = build(LLAMA).lm_head.weight.detach().float()
    head.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return head.to("cpu")


def int8():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    head = bnb.nn.Linear8bitLt(WIDTH, VOCAB, bias=False, has_fp16_weights=False)
    head.weight = bnb.nn.Int8Params(build(LLAMA).lm_head.weight.detach().clone(), requires_grad=False)
    return head.to("cpu")


def dynamic():
    head = nn.Sequential(nn.Linear(WIDTH, VOCAB, bias=False))
    return torch.ao.quantization.quantize_dynamic(head, {nn.Linear}, dtype=torch.qint8)[0]


def with_head(head):
    model = build(LLAMA).float()
    model.lm_head = head
    return model


RIGHT = {
    "packed tensor": fake,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
    "torchao intx": lambda: torchao("IntxWeightOnlyConfig"),
    "bitsandbytes nf4": bitsandbytes,
}


@pytest.mark.parametrize("head", RIGHT.values(), ids=RIGHT.keys())
def test_loss_logprobs_and_gradients(head):
    model, inputs = with_head(head()), batch()
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)
    assert len(got) > 5
    labels = inputs["labels"][:, 1:]
    logp = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double().log_softmax(-1)
    truth = logp[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels != -100, 0.0)
    assert_result(token_logprobs(model, inputs)[:, 1:], truth)


@pytest.mark.parametrize("head", list(RIGHT.values())[1:], ids=list(RIGHT)[1:])
def test_lora_on_a_quantised_head(head):
    peft = pytest.importorskip("peft")
    model = with_head(head())
    model.is_loaded_in_4bit = "bitsandbytes" in type(model.lm_head).__module__  # peft looks for it
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)
    assert any("lm_head" in name and "lora_B" in name for name in got)


def test_after_bitsandbytes_has_packed_its_weight_for_inference():
    model, inputs = with_head(bitsandbytes()), batch()
    expected = token_logprobs(model, inputs)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
    torch.testing.assert_close(token_logprobs(model, inputs), expected)


REFUSED = {
    "rounds its input": lambda: fake(RoundsItsInput),
    "torchao int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "bitsandbytes int8": int8,
    "torch.ao dynamic": dynamic,
}


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_product_is_refused(head):
    model = with_head(head())
    for use in (lambda: token_logprobs(model, batch()), lambda: fused_lm_head(model).apply()):
        with pytest.raises(ValueError, match=r"lm_head'\]\) or dequantise it"):
            use()
    assert model(input_ids=batch()["input_ids"]).logits.shape[-1] == VOCAB
