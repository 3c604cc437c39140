"""Models that are more than a decoder with a plain head: encoder-decoders, vocabulary biases, masked ids, inner heads,
prefixes, pictures.
"""

import pytest
import torch

from tests.hf_compare import assert_close, assert_no_logits, gradients
from tests.tolerance import assert_result
from tests.zoo.build import build
from tests.zoo.check import own_output, picked
from tests.zoo.inputs import batch
from var_kernels.integrations.hf import (
    capture,
    cross_reference_logprobs,
    fused_lm_head,
    sequence_logprobs,
    token_logprobs,
)
from var_kernels.integrations.hf.calibration import calibrate, calibrate_loss, is_causal

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bart():
    return build("bart", "BartForConditionalGeneration", decoder_only=False)


@pytest.fixture(scope="module")
def paligemma():
    return build("paligemma", "PaliGemmaForConditionalGeneration", decoder_only=False)


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


def test_encoder_decoder_scores_its_labels_where_they_stand(bart):
    inputs = batch(bart, encoder_decoder=True)
    labels = inputs["labels"]
    assert labels.shape != inputs["input_ids"].shape
    expected = picked(own_output(bart, inputs, with_labels=True).logits, labels, shift=False).detach()
    logp = token_logprobs(bart, inputs)
    assert_result(logp, expected)
    assert (logp[:, 0] != 0).all()
    assert_result(sequence_logprobs(bart, inputs), expected.sum(-1))
    given = {**inputs, "decoder_input_ids": bart.prepare_decoder_input_ids_from_labels(labels)}
    assert token_logprobs(bart, given).equal(logp)
    given["decoder_input_ids"] = given["decoder_input_ids"].roll(1, 1)
    assert not torch.allclose(token_logprobs(bart, given), logp)


def test_encoder_decoder_needs_labels(bart):
    inputs = batch(bart, encoder_decoder=True)
    with pytest.raises(TypeError, match=r"encoder-decoder.*labels \(B, T\)"):
        token_logprobs(bart, {name: value for name, value in inputs.items() if name != "labels"})
    with pytest.raises(TypeError, match="int64"):
        token_logprobs(bart, {**inputs, "labels": inputs["labels"].float()})


def test_who_cannot_handle_an_encoder_decoder_is_refused_one(bart):
    with pytest.raises(ValueError, match="encoder-decoder"):
        calibrate(bart)
    with pytest.raises(ValueError, match="encoder-decoder"):
        capture(bart, lambda hidden, head: hidden.sum(), {"input_ids": torch.tensor([[3, 4]])})
    with pytest.raises(ValueError, match="encoder-decoder"):
        cross_reference_logprobs(bart, [[3]], [[4]])


def test_decoder_padding_that_an_encoder_decoder_model_hides_itself():
    model = build("encoder-decoder", "EncoderDecoderModel", decoder_only=False)
    inputs = batch(model, encoder_decoder=True)
    own = own_output(model, inputs, with_labels=True).loss
    with fused_lm_head(model):
        fused = own_output(model, inputs, with_labels=True)
    assert fused.loss.item() == pytest.approx(own.item(), rel=2**-17)


# ---- the vocabulary --------------------------------------------------------------------------------------------------


def test_vocabulary_bias_is_read_when_it_is_used(bart):
    inputs = batch(bart, encoder_decoder=True)
    assert calibrate(bart, encoder_decoder=True).vocabulary_bias == "final_logits_bias"
    before = bart.final_logits_bias.clone()
    token_logprobs(bart, inputs)
    try:
        for value in (torch.zeros_like(before), before.flip(-1)):
            bart.final_logits_bias.copy_(value)
            expected = picked(own_output(bart, inputs, with_labels=True).logits, inputs["labels"], shift=False)
            assert_result(token_logprobs(bart, inputs).detach(), expected.detach())
    finally:
        bart.final_logits_bias.copy_(before)


def changed_llama(after):
    class Changed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.added = torch.nn.Parameter(torch.linspace(-2, 2, config.vocab_size))

        def forward(self, input_ids=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = after(self, out.logits)
            if labels is not None:
                out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
            return out

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return Changed(transformers.LlamaConfig(vocab_size=211, num_key_value_heads=4, **sizes)).eval()


def test_a_trainable_vocabulary_bias_gets_its_gradient():
    model = changed_llama(lambda self, z: (z + 3 * self.added) * 0.5)
    inputs = batch(model, encoder_decoder=False)
    found = calibrate(model)
    assert (found.vocabulary_bias, found.logit_scale) == ("added", 0.5)
    assert found.bias_ratio == pytest.approx(1.5, rel=1e-6)
    own = model(**inputs).loss
    own.backward()
    expected = gradients(model)
    with fused_lm_head(model):
        fused = model(**inputs).loss
    fused.backward()
    assert fused.item() == pytest.approx(own.item(), rel=2**-17)
    assert expected["added"].any()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize(
    "after",
    [
        lambda self, z: z + torch.linspace(0, 1, z.shape[-1]).to(z),
        lambda self, z: 5 * torch.tanh(z / 5) + self.added.to(z)[: z.shape[-1]],
        lambda self, z: z + self.added.square().to(z)[: z.shape[-1]],
    ],
    ids=["a constant", "after a softcap", "a function of it"],
)
def test_what_is_added_must_be_a_vector_of_the_model(after):
    with pytest.raises(ValueError, match=r"Changed cannot be used.*added"):
        token_logprobs(changed_llama(after), {"input_ids": torch.tensor([[3, 4, 5]])})


def test_masked_ids_get_no_probability():
    model = build("chameleon", "ChameleonForConditionalGeneration", decoder_only=False)
    inputs = batch(model, encoder_decoder=False)
    found = calibrate(model)
    assert found.masked == (150, 151)
    assert found.wide
    unmasked = dict(inputs)
    logits = own_output(model, unmasked, with_labels=False).logits.detach()
    assert (logits[..., [150, 151]] < -1e30).all()
    logp, entropy = token_logprobs(model, inputs, return_entropy=True)
    assert_result(logp.detach(), picked(logits, inputs["labels"], shift=True))
    assert entropy.isfinite().all()
    logits[..., [150, 151]] = 0
    assert not torch.allclose(picked(logits, inputs["labels"], shift=True).float(), logp, atol=1e-3)


# ---- what a model wants to be given ----------------------------------------------------------------------------------


def test_prefix_model_is_causal_where_token_type_ids_say_so(paligemma):
    inputs = batch(paligemma, encoder_decoder=False)
    bare = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    assert not calibrate(paligemma).causal
    assert is_causal(paligemma, {"input_ids": inputs["input_ids"], "token_type_ids": inputs["token_type_ids"]})
    expected = picked(own_output(paligemma, inputs, with_labels=False).logits, inputs["labels"], shift=True)
    assert_result(token_logprobs(paligemma, inputs).detach(), expected.detach())
    with pytest.raises(ValueError, match="not causal"):
        token_logprobs(paligemma, bare)


def test_a_model_that_wants_a_picture_is_looked_at_with_the_first_batch():
    model = build("blip-2", "Blip2ForConditionalGeneration", decoder_only=False)
    inputs = batch(model, encoder_decoder=False)
    own = own_output(model, inputs, with_labels=True).loss.item()
    forward = model.forward
    with pytest.raises(ValueError, match=r"Blip2ForConditionalGeneration.*trial forward pass.*pixel_values"):
        calibrate(model)
    with fused_lm_head(model):
        assert own_output(model, inputs, with_labels=False).logits.shape[-1] > 1
        for _ in range(2):
            out = own_output(model, inputs, with_labels=True)
            assert_no_logits(out.logits)
            assert out.loss.item() == pytest.approx(own, rel=2**-17)
    assert model.forward == forward
    with fused_lm_head(model):  # looked at already
        assert own_output(model, inputs, with_labels=True).loss.item() == pytest.approx(own, rel=2**-17)


def test_a_batch_that_does_not_run_is_refused_and_the_model_restored():
    model = build("blip-2", "Blip2ForConditionalGeneration", decoder_only=False)
    inputs = batch(model, encoder_decoder=False)
    with fused_lm_head(model), pytest.raises(ValueError, match="trial forward pass on the inputs that were given"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"], pixel_values=torch.zeros(3, 1))
    assert "forward" not in vars(model)


def test_head_of_an_inner_module():
    model = build("blip", "BlipForConditionalGeneration", decoder_only=False)
    assert model.get_output_embeddings() is None
    inputs = batch(model, encoder_decoder=False)
    expected = picked(own_output(model, inputs, with_labels=False).logits, inputs["labels"], shift=True)
    assert_result(token_logprobs(model, inputs).detach(), expected.detach())


def test_several_inner_heads_are_none():
    class Two(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.other = transformers.LlamaForCausalLM(config)
            self.third = transformers.LlamaForCausalLM(config)

        def get_output_embeddings(self):
            return None

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Two(transformers.LlamaConfig(vocab_size=211, tie_word_embeddings=False, **sizes))
    with pytest.raises(ValueError, match="must have an output embedding"):
        calibrate_loss(model)
