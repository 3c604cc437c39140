"""Forwards, losses and outputs as other people write them: right, or refused with the reason."""

import dataclasses
import threading
from collections import namedtuple

import pytest
import torch
from torch import nn

from tests.hf_compare import assert_close, assert_no_logits, gradients, own_and_fused, own_logprobs
from tests.hf_zoo import VOCAB, batch, build, llama
from tests.tolerance import assert_result
from var_kernels.integrations.hf import fused_lm_head, token_logprobs
from var_kernels.integrations.hf.calibration import calibrate

transformers = pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")
MIXTRAL = llama("MixtralForCausalLM", _moe=True)
GEMMA2 = llama("Gemma2ForCausalLM", final_logit_softcapping=7.5)


def custom(forward, **config):
    """A Llama with another forward: ``forward(self, plain, **kwargs)`` may call ``plain(**kwargs)``."""

    class Custom(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.tensor(1.7))

        def forward(self, *args, **kwargs):
            return forward(self, super().forward, *args, **kwargs)

    torch.manual_seed(0)
    return Custom(transformers.LlamaConfig(**{**LLAMA.config, **config})).eval()


def check_loss(model, inputs):
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


def inline(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# ---- what follows the head -------------------------------------------------------------------------------------------


def test_a_vocabulary_as_large_as_other_vectors_of_the_model():
    model = build(llama("LlamaForCausalLM", vocab_size=32))  # D = 32: norms have V elements too
    inputs = batch()
    inputs = {**inputs, "input_ids": inputs["input_ids"] % 32}
    inputs["labels"] = inputs["input_ids"].where(inputs["labels"] != -100, -100)
    assert calibrate(model).causal
    assert_result(token_logprobs(model, inputs), own_logprobs(model, inputs))
    check_loss(model, inputs)


@pytest.mark.parametrize("learned", [True, False], ids=["parameter", "buffer"])
def test_a_scale_that_the_model_learns(learned):
    def forward(self, plain, labels=None, **kwargs):
        out = plain(**kwargs)
        out.logits = out.logits * self.scale
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, VOCAB)
        return out

    model = custom(forward)
    if not learned:
        value = model.scale.detach()
        del model.scale
        model.register_buffer("scale", value)
    for use in (lambda: token_logprobs(model, batch()), lambda: fused_lm_head(model).apply()):
        with pytest.raises(ValueError, match=r"Custom.*parameter or buffer of one element follows its head: scale\."):
            use()


def test_a_scale_inside_the_body_is_none_of_our_business():
    def forward(self, plain, input_ids=None, **kwargs):
        return plain(inputs_embeds=self.scale * self.model.embed_tokens(input_ids), **kwargs)

    model = custom(forward)
    check_loss(model, batch())
    assert token_logprobs(model, batch()).isfinite().all()


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_loss", [False, True], ids=["loss_function", "loss in forward"])
def test_a_forward_of_args_and_kwargs(own_loss):
    def forward(self, plain, *args, labels=None, **kwargs):
        if not own_loss:
            return plain(*args, labels=labels, **kwargs)
        out = plain(*args, **kwargs)
        out.loss = None if labels is None else inline(out.logits, labels)
        return out

    model, inputs = custom(forward), batch()
    check_loss(model, inputs)
    own = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss.item()
    with fused_lm_head(model):
        out = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert_no_logits(out.logits)
    assert out.loss.item() == pytest.approx(own, rel=2**-17)


def bart():
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()


def test_an_encoder_decoder_whose_forward_someone_wrapped():
    model, inputs = bart(), batch()
    expected, plain = token_logprobs(model, inputs), model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert token_logprobs(model, inputs).equal(expected)
    own, _, loss, _ = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-17)


def test_a_head_called_by_keyword():
    def forward(self, plain, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(input=self.model(input_ids=input_ids).last_hidden_state)
        loss = None if labels is None else inline(logits, labels)
        return {"loss": loss, "logits": logits}

    model, inputs = custom(forward), batch()
    own = model(**inputs)["loss"].item()
    with fused_lm_head(model):
        out = model(**inputs)
    assert out["loss"].item() == pytest.approx(own, rel=2**-17)
    assert_no_logits(out["logits"])


def test_a_compiled_head():
    model = build(LLAMA)
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    check_loss(model, batch())


def test_embeddings_in_place_of_tokens():
    model, inputs = build(LLAMA), batch()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    upstream = torch.linspace(0.5, 1.5, inputs["labels"].numel()).view(inputs["labels"].shape)
    logits = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits.double()
    scored, labels = inputs["labels"][:, 1:] != -100, inputs["labels"][:, 1:].clamp(min=0).unsqueeze(-1)
    truth = logits.log_softmax(-1)[:, :-1].gather(-1, labels).squeeze(-1).where(scored, 0.0)
    (expected,) = torch.autograd.grad((truth * upstream[:, 1:]).sum(), embeds)
    logp = token_logprobs(model, {**inputs, "inputs_embeds": embeds})
    assert_result(logp[:, 1:], truth)
    (got,) = torch.autograd.grad((logp * upstream).sum(), embeds)
    assert_close({"": got.double()}, {"": expected.double()})
    packed = {"inputs_embeds": embeds, "labels": inputs["labels"], "position_ids": torch.arange(11).remainder(6)[None]}
    assert not token_logprobs(model, packed)[:, 6].any()
    with pytest.raises(ValueError, match="labels: expected with inputs_embeds"):
        token_logprobs(model, {"inputs_embeds": embeds})


# ---- which labels count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_loss", [False, True], ids=["loss_function", "loss in forward"])
def test_a_loss_that_leaves_out_what_the_mask_hides(own_loss):
    def forward(self, plain, labels=None, attention_mask=None, **kwargs):
        out = plain(attention_mask=attention_mask, **kwargs)
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, -100)
            out.loss = inline(out.logits, labels) if own_loss else self.loss_function(out.logits, labels, VOCAB)
        return out

    model, inputs = custom(forward), batch()
    inputs["labels"] = inputs["input_ids"]  # on padding too
    check_loss(model, inputs)
    assert model(**inputs).loss.item() != pytest.approx(build(LLAMA)(**inputs).loss.item(), rel=1e-5)
    del inputs["attention_mask"]
    check_loss(model, inputs)


@pytest.mark.parametrize("counts", [False, True])
def test_whether_a_loss_in_forward_divides_by_the_number_that_it_is_given(counts):
    def forward(self, plain, labels=None, num_items_in_batch=None, **kwargs):
        out = plain(**kwargs)
        if labels is not None:
            out.loss = inline(out.logits, labels)
            if counts and num_items_in_batch is not None:
                out.loss = out.loss * (labels[:, 1:] != -100).sum() / num_items_in_batch
        return out

    model, inputs = custom(forward), batch()
    check_loss(model, inputs)
    check_loss(model, {**inputs, "num_items_in_batch": torch.tensor(40)})


def test_labels_that_a_forward_changes():
    def forward(self, plain, input_ids=None, labels=None, **kwargs):
        if labels is not None:
            labels = labels.masked_fill(labels == 50, -100)
        return plain(input_ids=input_ids, labels=labels, **kwargs)

    model, inputs = custom(forward), batch()
    unchanged = model(**inputs).loss.item()
    inputs["labels"][:, 5] = 50
    check_loss(model, inputs)
    assert model(**inputs).loss.item() != pytest.approx(unchanged, rel=1e-5)


def test_shift_labels_that_a_loss_does_not_read():
    config = transformers.BartConfig(vocab_size=VOCAB, d_model=32, decoder_layers=1, decoder_ffn_dim=32)
    model, inputs = transformers.BartForCausalLM(config).eval(), batch()
    with fused_lm_head(model), pytest.raises(ValueError, match="shift_labels must be None, since BartForCausalLM"):
        model(**inputs, shift_labels=inputs["labels"].roll(1, 0))


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_a_tuple_with_an_auxiliary_loss_before_the_logits():
    model, inputs = build(MIXTRAL), batch()
    loss, aux, logits, *_ = model(**inputs, return_dict=False)
    assert logits.shape[-1] == VOCAB
    with fused_lm_head(model):
        got = model(**inputs, return_dict=False)
    assert got[0].item() == pytest.approx(loss.item(), rel=2**-17)
    assert got[1].item() == pytest.approx(aux.item(), rel=2**-17)
    assert_no_logits(got[2])


Named = namedtuple("Named", "loss logits")
Record = dataclasses.make_dataclass("Record", ["loss", "logits"])


@pytest.mark.parametrize("kind", [Named, Record], ids=lambda kind: kind.__name__)
def test_outputs_of_a_type_of_their_own(kind):
    def forward(self, plain, **kwargs):
        out = plain(**kwargs)
        return kind(out.loss, out.logits)

    model = custom(forward)
    check_loss(model, batch())
    assert token_logprobs(model, batch()).isfinite().all()


# ---- a model that changes, or is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (LLAMA, lambda model: model.resize_token_embeddings(128)),
        (GEMMA2, lambda model: setattr(model.config, "final_logit_softcapping", 3.0)),
    ],
    ids=["more tokens", "another softcap"],
)
def test_changes_while_the_head_is_fused(case, change):
    model, inputs = build(case), batch()
    torch.manual_seed(0)
    with fused_lm_head(model):
        with torch.no_grad():
            before = model(**inputs).loss.item()
        change(model)
        loss = model(**inputs).loss
        loss.backward()
    got = gradients(model)
    own = model(**inputs).loss
    own.backward()
    assert loss.item() == pytest.approx(own.item(), rel=2**-17) != pytest.approx(before, rel=1e-3)
    assert_close(got, gradients(model))


def test_other_special_tokens_are_no_reason_to_look_again():
    model, calls = build(LLAMA), []
    with fused_lm_head(model):
        model.model.register_forward_hook(lambda *_: calls.append(1))
        model.config.pad_token_id = 7  # as Trainer does, inside of whose sharded model no trial could run
        model(**batch())
    assert len(calls) == 1


def test_a_loss_function_set_after_calibration():
    model, inputs = build(LLAMA), batch()
    with fused_lm_head(model):
        first = model(**inputs).loss.item()
        model.loss_function = lambda logits, labels, vocab_size, **_: 2 * inline(logits, labels)
        assert model(**inputs).loss.item() == pytest.approx(2 * first, rel=2**-17)
        del model._loss_function
        assert model(**inputs).loss.item() == first
    assert model(**inputs).logits.shape[-1] == VOCAB


def test_another_thread_uses_the_model_while_it_is_tried():
    model, ids, seen = build(GEMMA2), batch()["input_ids"], []  # its embeddings are scaled by a buffer of one element
    expected = model(input_ids=ids).logits

    def use():
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits)

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()

    with_another = model.lm_head.register_forward_pre_hook(meanwhile)
    calibrate(model)
    with_another.remove()
    assert len(seen) == 3
    assert all(logits.equal(expected) for logits in seen)


def test_weights_that_are_not_loaded():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.config))
    inputs = {name: value.to("meta") for name, value in batch().items()}
    for use in (lambda: token_logprobs(model, inputs), lambda: fused_lm_head(model).apply()):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.*meta device.*load them"):
            use()


def test_another_default_device():
    model, inputs = build(LLAMA), batch()
    expected = token_logprobs(build(LLAMA), inputs)
    with torch.device("meta"):
        assert token_logprobs(model, inputs).equal(expected)
