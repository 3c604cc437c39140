"""Models that are offloaded, dispatched, compiled, copied, pickled, shared by threads; steps cut into micro-batches."""

import copy
import pickle
import threading

import pytest
import torch

from tests.hf_compare import assert_close, gradients, own_and_fused
from tests.hf_zoo import VOCAB, batch, build, llama
from tests.ranks import HANG
from tests.tolerance import assert_result
from var_kernels.integrations.hf import capture, fused_lm_head, sequence_logprobs, token_logprobs
from var_kernels.integrations.hf.model import next_labels
from var_kernels.ops import linear_weighted_nll

pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")
TIED = llama("LlamaForCausalLM", tie_word_embeddings=True)


def adapted(model, modules=("q_proj", "lm_head")):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=list(modules), r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora on the head"])
def test_a_head_that_accelerate_dispatches(where, lora, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, inputs = build(LLAMA).float(), batch()
    plain, prefix = (adapted(plain), "base_model.model.") if lora else (plain, "")
    device_map = {f"{prefix}model": "cpu", f"{prefix}lm_head": where}
    options = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
    model = accelerate.dispatch_model(copy.deepcopy(plain), device_map, **options)
    head = model.get_output_embeddings()
    assert (head.weight.device.type == "meta") == (where == "disk")
    with torch.no_grad():
        expected = token_logprobs(plain, inputs)
        for _ in range(2):
            assert_result(token_logprobs(model, inputs), expected.double())
        with fused_lm_head(model):
            assert model(**inputs).loss.item() == pytest.approx(plain(**inputs).loss.item(), rel=2**-17)
    if where == "cpu":
        plain(**inputs).loss.backward()
        with fused_lm_head(model):
            model(**inputs).loss.backward()
        assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_adapter_learns_beside_an_offloaded_head(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, inputs = adapted(build(LLAMA).float(), ["q_proj"]), batch()
    device_map = {"base_model.model.model": "cpu", "base_model.model.lm_head": where}
    options = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
    model = accelerate.dispatch_model(copy.deepcopy(plain), device_map, **options)
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)
    plain(**inputs).loss.backward()
    assert_close(got, gradients(plain))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora on the head"])
def test_a_compiled_model_learns_the_same(lora):
    model = build(llama("LlamaForCausalLM", num_hidden_layers=1)).float()
    model = adapted(model) if lora else model
    compiled = torch.compile(model, backend="eager")
    own, expected, loss, got = own_and_fused(model, model, batch())
    with fused_lm_head(compiled):
        compiled(**batch()).loss.backward()
    assert_close(gradients(model), expected)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


# ---- copies, threads -------------------------------------------------------------------------------------------------


def test_a_model_pickles_while_its_head_is_fused():
    model, inputs = build(LLAMA), batch()
    own = model(**inputs).loss.item()
    with fused_lm_head(model):
        sent = pickle.loads(pickle.dumps(model))
        model(**inputs).loss.backward()
        state = model.state_dict()
    assert sent(**inputs).loss.item() == own
    assert sent(**inputs).logits.shape[-1] == VOCAB
    assert state.keys() == model.state_dict().keys()


def test_saving_and_loading_while_the_head_is_fused(tmp_path):
    model, inputs = build(LLAMA), batch()
    own = model(**inputs).loss.item()
    with fused_lm_head(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=model.dtype).eval()
    assert loaded(**inputs).loss.item() == own


def test_two_threads_of_one_model_are_refused_and_of_two_are_safe():
    inputs, found = batch(), []
    models = [build(LLAMA) for _ in range(2)]
    expected = token_logprobs(models[0], inputs)
    token_logprobs(models[1], inputs)

    def work(model):
        try:
            found.append(token_logprobs(model, inputs))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(logp, expected) for logp in found)

    inside, go = threading.Event(), threading.Event()

    def waits(hidden, head):
        inside.set()
        go.wait(HANG)
        return hidden.sum()

    slow = threading.Thread(target=lambda: capture(models[0], waits, {"input_ids": inputs["input_ids"]}))
    slow.start()
    inside.wait(HANG)
    try:
        with pytest.raises(RuntimeError, match="captured already"):
            token_logprobs(models[0], inputs)
        logits = models[0](input_ids=inputs["input_ids"]).logits  # without a loss the model serves all threads
        assert logits.equal(models[1](input_ids=inputs["input_ids"]).logits)
    finally:
        go.set()
        slow.join()
    assert token_logprobs(models[0], inputs).equal(expected)


# ---- accumulation ----------------------------------------------------------------------------------------------------


def micro_batches(inputs):
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(inputs["input_ids"]))]


def token_normalised(model, inputs, whole):
    with fused_lm_head(model):
        return model(**inputs, num_items_in_batch=(whole["labels"][:, 1:] != -100).sum()).loss


def sequence_normalised(model, inputs, whole):
    """The mean over sequences of each one's mean over its tokens."""
    lengths = (inputs["labels"][:, 1:] != -100).sum(-1)
    return -(sequence_logprobs(model, inputs) / lengths).sum() / len(whole["input_ids"])


def batch_normalised(model, inputs, whole):
    """The sum over tokens, weighted, divided by the number of sequences; in one pass inside the head."""

    def in_head(hidden, head):
        labels = next_labels(inputs["labels"], hidden)
        weight = torch.linspace(0.5, 1.5, labels.shape[1]).expand(labels.shape)
        options = {**head.logit_options, "reduction": "mean", "num_items": len(whole["input_ids"])}
        return linear_weighted_nll(hidden, head.lm_head_weight, labels, weight, head.bias, **options)

    (loss,), _ = capture(model, in_head, {n: t for n, t in inputs.items() if n != "labels"}, low_rank=True)
    return loss


@pytest.mark.parametrize("loss_of", [token_normalised, sequence_normalised, batch_normalised])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora on the head"])
def test_accumulation_equals_one_large_batch(loss_of, lora):
    model, inputs = build(TIED), batch()
    model = adapted(model) if lora else model
    large = loss_of(model, inputs, inputs)
    large.backward()
    expected = gradients(model)
    total = 0.0
    for part in micro_batches(inputs):
        loss = loss_of(model, part, inputs)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(large.item(), rel=1e-6)
    assert_close(gradients(model), expected, bound=2**-17)


# ---- 16 bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora on the head"])
def test_fp32_masters_under_fp16_autocast_and_a_scaler(lora):
    model = build(LLAMA).float()
    model = adapted(model) if lora else model
    own = model(**batch()).loss
    own.backward()
    expected = gradients(model)
    scale = 2.0**14
    with torch.autocast("cpu", torch.float16), fused_lm_head(model):
        loss = model(**batch()).loss
    (loss * scale).backward()
    got = {name: g / scale for name, g in gradients(model).items()}
    assert loss.item() == pytest.approx(own.item(), rel=2**-8)
    assert_close(got, expected, bound=2**-5)
