"""The modes, precisions and wrappers that the fused head works under."""

import types

import pytest
import torch

from tests.hf_compare import assert_close, gradients, own_and_fused
from tests.hf_zoo import VOCAB, Case, batch, build, llama
from tests.tolerance import assert_result
from var_kernels.integrations.hf import capture, fused_lm_head, token_logprobs
from var_kernels.integrations.hf.calibration import calibrate_loss
from var_kernels.integrations.hf.model import inner_model

pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")
GEMMA2 = llama("Gemma2ForCausalLM", final_logit_softcapping=7.5)
MIXTRAL = llama("MixtralForCausalLM", _moe=True)


# ---- modes, precisions, wrappers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_train_mode(reentrant):
    model = build(LLAMA).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


def test_dropout_draws_the_same_masks():
    model = build(Case("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4})).train()
    inputs = batch()
    calibrate_loss(model)
    torch.manual_seed(3)
    own = model(**inputs).loss.item()
    torch.manual_seed(4)
    other = model(**inputs).loss.item()
    torch.manual_seed(3)
    with fused_lm_head(model):
        assert model(**inputs).loss.item() == pytest.approx(own, rel=2**-17)
    assert own != pytest.approx(other, rel=2**-17)


def true_logprobs(model, inputs):
    """From the hidden states that the model's own head gets, in fp64."""
    labels = inputs["labels"]

    def fn(hidden, head):
        logits = hidden.double() @ head.lm_head_weight.double().T
        return logits.log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)

    (logp,), _ = capture(model, fn, {k: v for k, v in inputs.items() if k != "labels"})
    return torch.nn.functional.pad(logp.where(labels[:, 1:] != -100, 0.0), (1, 0))


def test_bf16_log_probs_are_exact_and_gradients_good_to_bf16():
    model = build(LLAMA).bfloat16()
    inputs = batch()
    truth = true_logprobs(model, inputs)
    truth.sum().backward()
    expected = gradients(model)
    logp = token_logprobs(model, inputs)
    assert logp.dtype == torch.float32
    assert_result(logp, truth)
    logp.sum().backward()
    # dhidden is rounded to bf16 once in either case; what follows is the same bf16 backward
    assert_close(gradients(model), expected, bound=2**-6)
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=2**-7)
    assert_close(got, expected, bound=2**-5)


def test_autocast():
    model = build(LLAMA)
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        own, expected, loss, got = own_and_fused(model, model, inputs)
        logp = token_logprobs(model, inputs)
    assert logp.dtype == torch.float32
    assert loss == pytest.approx(own, rel=2**-7)
    assert_close(got, expected, bound=2**-5)
    assert all(g.dtype == torch.float64 and g.isfinite().all() for g in got.values())


@pytest.mark.slow  # torch.compile alone takes seconds to start
def test_compiled_model():
    model = build(llama("LlamaForCausalLM", num_hidden_layers=1))
    own = model(**batch()).loss.item()
    compiled = torch.compile(model, backend="eager")
    with fused_lm_head(compiled):
        assert compiled(**batch()).loss.item() == pytest.approx(own, rel=2**-17)
    assert compiled(**batch()).logits.shape[-1] == VOCAB


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once():
    compiled = torch.compile(build(llama("LlamaForCausalLM", num_hidden_layers=1)), backend="eager")
    inputs = batch()
    expected = token_logprobs(compiled, inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            logp = token_logprobs(compiled, inputs)
            logp.sum().backward()
            assert logp.equal(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LLAMA, GEMMA2, MIXTRAL], ids=lambda case: case.id)
def test_on_a_gpu(case):
    model = build(case).cuda()
    inputs = {name: value.cuda() for name, value in batch().items()}
    truth = token_logprobs(build(case), batch())
    logp = token_logprobs(model, inputs)
    assert logp.device.type == "cuda"
    assert (logp.cpu() - truth).abs().max() <= 1e-3  # TF32 or not, the hidden states are another machine's
    own, expected, loss, got = own_and_fused(model, model, inputs)
    assert loss == pytest.approx(own, rel=1e-4)
    assert_close(got, expected, bound=1e-3)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True], ids=["", "find_unused_parameters"])
def test_ddp(one_process, find_unused):
    model = build(MIXTRAL)
    own = model(**batch()).loss
    own.backward()
    expected = gradients(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    with fused_lm_head(wrapped):
        out = wrapped(**batch())
        out.loss.backward()
    assert out.loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert_close(gradients(model), expected)
    token_logprobs(wrapped, batch()).sum().backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("head_apart", [False, True], ids=["head in the root", "head a unit of its own"])
def test_fsdp2_gathers_the_head_for_the_backward(one_process, head_apart):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, plain = build(LLAMA), build(LLAMA)
    plain(**batch()).loss.backward()
    loss_gradients = gradients(plain)
    token_logprobs(plain, batch()).square().sum().backward()
    logp_gradients = gradients(plain)

    mesh = init_device_mesh("cpu", (1,))
    for module in [*model.model.layers, *([model.lm_head] if head_apart else [])]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def whole(found):
        return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}

    with fused_lm_head(model):
        model(**batch()).loss.backward()
    assert_close(whole(gradients(model)), loss_gradients)
    token_logprobs(model, batch()).square().sum().backward()
    assert_close(whole(gradients(model)), logp_gradients)


def test_a_forward_that_was_bound_to_the_model():
    """What accelerate does to any forward when it takes autocast off a model."""
    model = build(LLAMA)
    with fused_lm_head(model):
        expected = model(**batch()).loss
        model.forward = types.MethodType(model.forward, model)
        assert torch.equal(model(**batch()).loss, expected)


def test_weights_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = build(LLAMA)
    expected = token_logprobs(model, batch()).detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        assert token_logprobs(model, batch()).equal(expected)
        assert model(**batch()).logits.shape[-1] == VOCAB
    assert model.lm_head.weight.device.type == "meta"


def test_copies_in_threads_are_refused():
    wrapped = torch.nn.DataParallel(build(LLAMA))
    assert inner_model(wrapped) is wrapped.module
    wrapped.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        fused_lm_head(wrapped)
