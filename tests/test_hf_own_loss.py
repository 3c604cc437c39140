"""Losses of the user's own under fused_lm_head: the model's own number and gradients, or a refusal by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.hf_compare import assert_close, assert_no_logits, gradients, own_and_fused
from tests.hf_zoo import VOCAB, batch, build, llama
from var_kernels.integrations.hf import fused_lm_head

transformers = pytest.importorskip("transformers")

LLAMA = llama("LlamaForCausalLM")
WEIGHTS = torch.linspace(0.1, 2.0, VOCAB)
RIGHT, REFUSED = {}, {}


def right(loss):
    RIGHT[loss.__name__] = loss


def refused(words):
    def register(loss):
        REFUSED[loss.__name__] = (loss, words)

    return register


def cross_entropy(logits, labels, **options):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def token_nll(logits, labels):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def picked(values, labels):
    return values.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


# ---- what a loss may do ----------------------------------------------------------------------------------------------


@right
def a_mean_of_the_sequences_means(logits, labels, **_):
    counted = labels[:, 1:] != -100
    return ((token_nll(logits, labels) * counted).sum(1) / counted.sum(1)).mean()


@right
def the_module(logits, labels, **_):
    return nn.CrossEntropyLoss()(logits[..., :-1, :].contiguous().view(-1, VOCAB), labels[..., 1:].reshape(-1))


@right
def another_ignore_index(logits, labels, **_):
    return cross_entropy(logits, labels.masked_fill(labels == -100, 0), ignore_index=0)


@right
def pad_ids_left_out(logits, labels, **_):
    return cross_entropy(logits, labels.masked_fill(labels % 7 == 0, -100))


@right
def the_last_tokens(logits, labels, **_):
    return F.cross_entropy(logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten())


@right
def label_smoothing(logits, labels, **_):
    return cross_entropy(logits, labels, label_smoothing=0.1)


@right
def class_weights(logits, labels, **_):
    return cross_entropy(logits, labels, weight=WEIGHTS)


@right
def class_weights_summed(logits, labels, **_):
    return cross_entropy(logits, labels, weight=WEIGHTS, reduction="sum") / 7


@right
def focal(logits, labels, **_):
    nll = cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()


@right
def z_loss(logits, labels, **_):
    return cross_entropy(logits.float(), labels) + 1e-3 * torch.logsumexp(logits, -1).square().mean()


@right
def log_softmax_and_gather(logits, labels, **_):
    counted = labels[:, 1:] != -100
    return -(picked(logits[:, :-1].log_softmax(-1), labels[:, 1:]) * counted).sum() / counted.sum()


@right
def negative_log_softmax_and_gather(logits, labels, **_):
    nll, labels = -F.log_softmax(logits[:, :-1], dim=-1), labels[:, 1:]
    return picked(nll, labels).masked_fill(labels == -100, 0.0).sum() / (labels != -100).sum()


@right
def take_along_dim(logits, labels, **_):
    at = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    return -torch.take_along_dim(logits[:, :-1].log_softmax(-1), at, dim=-1).mean()


@right
def logsumexp_and_gather(logits, labels, **_):
    logits, labels = logits[:, :-1], labels[:, 1:]
    return ((logits.logsumexp(-1) - picked(logits, labels)) * (labels != -100)).sum()


@right
def softmax_and_gather(logits, labels, **_):
    return -torch.log(1 - picked(logits[:, :-1].softmax(-1), labels[:, 1:]) + 1e-6).mean()


@right
def log_of_softmax(logits, labels, **_):
    return F.nll_loss(torch.log(torch.softmax(logits[:, :-1].flatten(0, 1), -1)), labels[:, 1:].flatten())


@right
def nll_loss(logits, labels, **_):
    return F.nll_loss(F.log_softmax(logits[:, :-1].reshape(-1, VOCAB), -1), labels[:, 1:].flatten(), weight=WEIGHTS)


@right
def rows_by_a_mask(logits, labels, **_):
    counted = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted])


@right
def indexed_by_tensors(logits, labels, **_):
    counted = (labels[:, 1:] != -100).flatten()
    logp = logits[:, :-1].flatten(0, 1)[counted].log_softmax(-1)
    return -logp[torch.arange(int(counted.sum())), labels[:, 1:].flatten()[counted]].mean()


@right
def rows_that_come_twice(logits, labels, **_):
    twice = torch.tensor([0, 0, 2])
    return cross_entropy(logits[twice], labels[twice])


@right
def a_loop_over_rows(logits, labels, **_):
    return torch.stack(
        [F.cross_entropy(z[:-1], y[1:], reduction="sum") for z, y in zip(logits, labels, strict=True)]
    ).mean()


@right
def chunks(logits, labels, **_):
    pieces = zip(logits[:, :-1].split(3, 1), labels[:, 1:].split(3, 1), strict=True)
    return sum(F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") for z, y in pieces) / 20


@right
def rows_put_together(logits, labels, **_):
    pieces = [(z[:-1][y[1:] != -100], y[1:][y[1:] != -100]) for z, y in zip(logits, labels, strict=True)]
    return F.cross_entropy(torch.cat([z for z, _ in pieces]), torch.cat([y for _, y in pieces]))


@right
def weights_of_positions(logits, labels, **_):
    nll = token_nll(logits, labels)
    return (nll * torch.linspace(0.5, 1.5, nll.shape[1])).mean()


@right
def weights_of_ids(logits, labels, **_):
    return (token_nll(logits, labels) * labels[:, 1:] / VOCAB).mean()


@right
def two_calls(logits, labels, **_):
    return cross_entropy(logits, labels) + 0.3 * F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())


@right
def doubled_with_an_offset(logits, labels, **_):
    return 2 * cross_entropy(logits, labels) + 0.5


@right
def of_the_length(logits, labels, **_):
    return cross_entropy(logits, labels) * (2 if labels.shape[1] > 9 else 1)


@right
def weighted_by_its_own_accuracy(logits, labels, **_):
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
    return cross_entropy(logits, labels) * (1 + hits)


@right
def weighted_by_detached_losses(logits, labels, **_):
    return (token_nll(logits, labels) / (1 + token_nll(logits.detach(), labels))).mean()


@right
def without_shift(logits, labels, **_):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


# ---- what it may not -------------------------------------------------------------------------------------------------


@refused(r"cross_entropy of other logits than the model's own: they differ by up to")
def a_temperature(logits, labels, **_):
    return cross_entropy(logits / 2, labels)


@refused(r"cross_entropy of other logits than the model's own")
def a_scale_in_place(logits, labels, **_):
    logits = logits.float()
    logits /= 2
    return cross_entropy(logits, labels)


@refused(r"after another view of its logits was written to")
def a_view_in_place(logits, labels, **_):
    logits[:, :-1].mul_(1.0)
    return cross_entropy(logits, labels)


@refused(r"cross_entropy of other logits than the model's own: 90 ids in place of 97")
def a_part_of_the_vocabulary(logits, labels, **_):
    return cross_entropy(logits[..., :90], labels.clamp(max=89))


@refused(r"torch.Tensor.mul of logits with logits")
def an_entropy(logits, labels, **_):
    return cross_entropy(logits, labels) - 0.01 * (logits.softmax(-1) * logits.softmax(-1).log()).sum(-1).mean()


@refused(r"torch.Tensor.square")
def a_penalty_on_logits(logits, labels, **_):
    return cross_entropy(logits, labels) + 1e-3 * logits.square().mean()


@refused(r"cross_entropy with probabilities as targets")
def targets_of_probabilities(logits, labels, **_):
    return F.cross_entropy(logits.flatten(0, 1), F.one_hot(labels.clamp(min=0).flatten(), VOCAB).float())


@refused(r"torch.full_like")
def a_divergence(logits, labels, **_):
    return F.kl_div(logits.log_softmax(-1), torch.full_like(logits, 1 / VOCAB))


@refused(r"cross_entropy with class weights and label_smoothing")
def smoothed_classes(logits, labels, **_):
    return cross_entropy(logits, labels, weight=WEIGHTS, label_smoothing=0.1)


@refused(r"torch.Tensor.mul with a tensor for each row")
def a_mask_on_logits(logits, labels, **_):
    return cross_entropy(logits * (labels != -100).unsqueeze(-1), labels)


@refused(r"torch.Tensor.cpu|numpy|__array__")
def numbers_of_numpy(logits, labels, **_):
    return cross_entropy(logits, labels) + float(logits.detach().numpy().mean())


class HalvesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@refused(r"a torch.autograd.Function, whose gradient would be lost")
def halved_gradients(logits, labels, **_):
    return cross_entropy(HalvesGradients.apply(logits), labels)


@refused(r"Tensor.register_hook")
def a_hook_on_logits(logits, labels, **_):
    logits.register_hook(lambda grad: 2 * grad)
    return cross_entropy(logits, labels)


@refused(r"torch.Tensor.retain_grad")
def gradients_of_logits(logits, labels, **_):
    logits.retain_grad()
    return cross_entropy(logits, labels)


@refused(r"torch.Tensor.mul with a tensor for each row, or with a number that it learns")
def a_learned_temperature(logits, labels, **_):
    return cross_entropy(logits * torch.ones((), requires_grad=True), labels)


@refused(r"cross_entropy of other logits than the model's own: other ids are masked")
def a_masked_id(logits, labels, **_):
    logits[..., 3] = float("-inf")
    return cross_entropy(logits, labels)


@refused(r"aten.cross_entropy_loss")
def an_operator_of_aten(logits, labels, **_):
    return torch.ops.aten.cross_entropy_loss(logits.flatten(0, 1), labels.flatten())


@torch.jit.script
def _scripted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@refused(r"must be Python code where it reads logits, got TorchScript")
def torchscript(logits, labels, **_):
    return _scripted(logits, labels)


# ---- the model -------------------------------------------------------------------------------------------------------


def hooked(loss, case=LLAMA):
    """By transformers' hook."""
    model = build(case)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: loss(logits, labels, **kwargs)
    return model


def inline(loss):
    """In a forward of its own."""

    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if labels is not None:
                out.loss = loss(out.logits, labels, model=self, attention_mask=attention_mask, **kwargs)
            return out

    torch.manual_seed(0)
    model = Own(transformers.LlamaConfig(**LLAMA.config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model


def assert_own(model, inputs, call=None):
    own, expected, loss, got = own_and_fused(model, model if call is None else call, inputs)
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


def padded(side):
    inputs = batch()
    return inputs if side == "right" else {name: value.flip(1) for name, value in inputs.items()}


@pytest.mark.parametrize("made", [hooked, inline], ids=["hook", "forward"])
@pytest.mark.parametrize("loss", RIGHT.values(), ids=RIGHT)
def test_right(loss, made):
    for side in ("right", "left"):
        assert_own(made(loss), padded(side))


@pytest.mark.parametrize("made", [hooked, inline], ids=["hook", "forward"])
@pytest.mark.parametrize(("loss", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(loss, words, made):
    model = made(loss)
    with fused_lm_head(model), pytest.raises(ValueError, match=words):
        model(**batch())
    assert model(input_ids=batch()["input_ids"]).logits.isfinite().all()


def test_the_labels_outside_the_vocabulary_are_named():
    model = hooked(cross_entropy)
    inputs = batch()
    inputs["labels"][0, 4] = VOCAB
    with fused_lm_head(model), pytest.raises(ValueError, match=rf"labels must be in \[0, {VOCAB}\)"):
        model(**inputs)


def test_an_ignored_label_is_no_id_to_gather():
    """torch raises IndexError; it must not be a log-prob of 0."""
    model = hooked(lambda logits, labels: -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean())
    with fused_lm_head(model), pytest.raises(ValueError, match=r"labels must be in"):
        model(**batch())


# ---- keywords, state, settings ---------------------------------------------------------------------------------------


def with_keywords(logits, labels, loss_weight=None, reduction="mean", num_items_in_batch=None, last=None, **_):
    if last is not None:
        labels = labels.clone()
        labels[:, :-last] = -100
    nll, weight = token_nll(logits, labels), (labels[:, 1:] != -100).float()
    weight = weight if loss_weight is None else weight * loss_weight[:, 1:]
    total = (nll * weight).sum()
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total if reduction == "sum" else total / weight.sum()


@pytest.mark.parametrize("made", [hooked, inline], ids=["hook", "forward"])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"loss_weight": torch.linspace(0, 2, 33).view(3, 11)},
        {"reduction": "sum"},
        {"num_items_in_batch": torch.tensor(40)},
        {"last": 3},
    ],
    ids=lambda keywords: ",".join(keywords) or "none",
)
def test_keywords_reach_the_loss(keywords, made):
    assert_own(made(with_keywords), {**batch(), **keywords})


@pytest.mark.parametrize("made", [hooked, inline], ids=["hook", "forward"])
def test_a_loss_that_counts_its_calls_is_called_once_a_step(made):
    curves = []
    for fused in (False, True):
        calls = []

        def warming_up(logits, labels, calls=calls, **_):
            calls.append(1)
            return cross_entropy(logits, labels) * len(calls)

        model = made(warming_up)
        head = fused_lm_head(model)
        if fused:
            head.apply()
        curves.append([model(**batch()).loss.item() for _ in range(4)])
        model.config.output_attentions = False
        head.restore()
        assert len(calls) == 4
    assert curves[1] == pytest.approx(curves[0], rel=2**-17)
    assert curves[0][3] == pytest.approx(4 * curves[0][0])


def test_a_loss_that_reads_mode_and_config():
    def loss(logits, labels, model, **_):
        value = cross_entropy(logits, labels, label_smoothing=0.1 if model.training else 0.0)
        return value * getattr(model.config, "loss_scale", 1.0)

    model = inline(loss)
    assert_own(model, batch())
    assert_own(model.train(), batch())
    model.config.loss_scale = 3.0
    assert_own(model, batch())


def test_a_loss_that_another_takes_the_place_of_while_the_head_is_fused():
    model = build(LLAMA)
    own = model(**batch()).loss.item()
    with fused_lm_head(model):
        for loss in (a_mean := RIGHT["a_mean_of_the_sequences_means"], RIGHT["focal"]):
            model.loss_function = lambda logits, labels, vocab_size, loss=loss, **_: loss(logits, labels)
            got = model(**batch()).loss.item()
            with torch.no_grad():
                logits = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits
            assert got == pytest.approx(loss(logits, batch()["labels"]).item(), rel=2**-17)
        del model._loss_function
        assert model(**batch()).loss.item() == pytest.approx(own, rel=2**-17)
    assert a_mean


def test_a_loss_of_transformers_that_is_replaced_in_its_table(monkeypatch):
    from transformers.loss import loss_utils

    def theirs(logits, labels, vocab_size, **_):
        return RIGHT["a_mean_of_the_sequences_means"](logits, labels)

    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", theirs)
    assert_own(build(LLAMA), batch())
    monkeypatch.undo()
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda z, y, *_, **__: 2 * F.cross_entropy(z, y))
    assert_own(build(LLAMA), batch())


def test_a_method_of_a_subclass():
    class Own(transformers.LlamaForCausalLM):
        def loss_function(self, logits, labels, vocab_size, **_):
            return RIGHT["focal"](logits, labels)

    torch.manual_seed(0)
    assert_own(Own(transformers.LlamaConfig(**LLAMA.config)).eval(), batch())


def test_labels_that_a_wrapped_forward_changes():
    model = build(LLAMA)
    plain = model.forward

    def forward(*args, labels=None, **kwargs):
        out = plain(*args, labels=None if labels is None else labels.masked_fill(labels % 5 == 0, -100), **kwargs)
        return out if labels is None else {**out, "loss": 2 * out.loss}

    model.forward = forward
    inputs = batch()
    own = model(**inputs)["loss"].item()
    with fused_lm_head(model):
        out = model(**inputs)
    assert out["loss"].item() == pytest.approx(own, rel=2**-17)
    assert_no_logits(out["logits"])


# ---- what the model does around its head -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        llama("Gemma2ForCausalLM", final_logit_softcapping=7.5),
        llama("CohereForCausalLM", logit_scale=0.37),
        llama("GraniteForCausalLM", logits_scaling=2.5),
        llama("PhimoeForCausalLM", lm_head_bias=True, num_local_experts=4, num_experts_per_tok=2),
        llama("MixtralForCausalLM", _moe=True),
    ],
    ids=lambda case: case.id,
)
def test_scale_softcap_bias_and_auxiliary_losses(case):
    assert_own(hooked(RIGHT["a_mean_of_the_sequences_means"], case), batch())
    assert_own(hooked(RIGHT["log_softmax_and_gather"], case), batch())


def test_logits_that_the_forward_scales_in_training_only():
    """No trial in eval mode can see it."""

    def loss(logits, labels, model, **_):
        return cross_entropy(logits * 0.5 if model.training else logits, labels)

    model = inline(loss)
    assert_own(model, batch())
    with fused_lm_head(model.train()), pytest.raises(ValueError, match="of other logits than the model's own"):
        model(**batch())


@pytest.mark.parametrize("frozen", ["body", "head"])
@pytest.mark.parametrize("name", ["a_mean_of_the_sequences_means", "log_softmax_and_gather", "two_calls"])
def test_what_is_frozen(name, frozen):
    model = hooked(RIGHT[name])
    (model.model if frozen == "body" else model.lm_head).requires_grad_(False)
    assert_own(model, batch())
    model = hooked(REFUSED["halved_gradients"][0])
    (model.model if frozen == "body" else model.lm_head).requires_grad_(False)
    with fused_lm_head(model), pytest.raises(ValueError, match="whose gradient would be lost"):
        model(**batch())


def test_a_loss_that_learns():
    scale = nn.Parameter(torch.tensor(2.0))
    model = hooked(lambda logits, labels: scale * cross_entropy(logits, labels))
    own = model(**batch()).loss
    own.backward()
    expected, scale.grad = scale.grad, None
    with fused_lm_head(model):
        model(**batch()).loss.backward()
    torch.testing.assert_close(scale.grad, expected)


def test_an_encoder_decoder():
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": VOCAB}

    class Own(transformers.T5ForConditionalGeneration):
        def forward(self, labels=None, decay=1.0, **kwargs):
            out = super().forward(labels=labels, **kwargs)
            if labels is not None:
                nll = F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="none")
                out.loss = out.loss + decay * ((nll * (labels != -100)).sum(1) / (labels != -100).sum(1)).mean()
            return out

    torch.manual_seed(0)
    model = Own(transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    assert_own(model, batch())
    assert_own(model, {**batch(), "decay": 0.3})


# ---- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [hooked, inline], ids=["hook", "forward"])
@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "lm_head"]], ids=["lora", "lora on the head"])
def test_peft(modules, made):
    peft = pytest.importorskip("peft")
    for name in ("a_mean_of_the_sequences_means", "rows_that_come_twice", "log_softmax_and_gather", "z_loss"):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=modules, r=4, init_lora_weights=False)
        model = peft.get_peft_model(made(RIGHT[name]).float(), config).eval()
        assert_own(model, batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made"),
    [("a_mean_of_the_sequences_means", hooked), ("log_softmax_and_gather", inline)],
    ids=["hook", "forward"],
)
def test_compiled(name, made):
    model = made(RIGHT[name])
    own = model(**batch()).loss
    own.backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend="eager")
    with fused_lm_head(compiled):
        for _ in range(2):
            loss = compiled(**batch()).loss
    loss.backward()
    assert loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert_close(gradients(model), expected)


@pytest.mark.slow
def test_a_loss_function_that_is_compiled():
    compiled = torch.compile(lambda logits, labels: cross_entropy(logits, labels, label_smoothing=0.1), backend="eager")
    assert_own(hooked(compiled), batch())


def test_checkpointing_and_autocast():
    model = hooked(RIGHT["a_mean_of_the_sequences_means"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_own(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        own, expected, loss, got = own_and_fused(model, model, batch())
    assert loss == pytest.approx(own, rel=2**-7)
    assert_close(got, expected, bound=2**-5)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True], ids=["", "find_unused_parameters"])
def test_ddp(one_process, find_unused):
    model = hooked(RIGHT["a_mean_of_the_sequences_means"])
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=find_unused)
    wrapped.module.loss_function = model.loss_function
    own = model(**batch()).loss
    own.backward()
    with fused_lm_head(wrapped):
        loss = wrapped(**batch()).loss
    loss.backward()
    assert loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert_close(gradients(wrapped.module), gradients(model))


@pytest.mark.parametrize("head_apart", [False, True], ids=["head in the root", "head a unit of its own"])
def test_fsdp2(one_process, head_apart):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = (hooked(RIGHT["a_mean_of_the_sequences_means"]) for _ in range(2))
    own = plain(**batch()).loss
    own.backward()
    mesh = init_device_mesh("cpu", (1,))
    for module in [*model.model.layers, *([model.lm_head] if head_apart else []), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if head_apart:
        with fused_lm_head(model), pytest.raises(ValueError, match=r"lm_head weight is in memory, got .*model's root"):
            model(**batch())
        return
    with fused_lm_head(model):
        loss = model(**batch()).loss
    loss.backward()
    assert loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert_close({n: g.full_tensor() for n, g in gradients(model).items()}, gradients(plain))


def test_no_logits_are_made():
    from tests.test_hf_head import LargestTensor

    model = hooked(RIGHT["log_softmax_and_gather"], llama("LlamaForCausalLM", vocab_size=16001, num_hidden_layers=1))
    ids = torch.randint(3, 16001, (2, 300), generator=torch.Generator().manual_seed(0))
    with fused_lm_head(model, workspace_mb=8), LargestTensor() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen.elements < 600 * 16001 / 4
