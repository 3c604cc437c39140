"""Several sequences in a row without padding: each is scored as if it stood alone."""

import pytest
import torch

from tests.hf_compare import assert_close, gradients, own_and_fused
from tests.hf_zoo import VOCAB, ZOO, build, llama
from tests.tolerance import assert_result
from var_kernels import VARLoss
from var_kernels.integrations.hf import capture, sequence_logprobs, token_logprobs
from var_kernels.integrations.hf.logprobs import sequence_starts
from var_kernels.integrations.hf.model import next_labels

transformers = pytest.importorskip("transformers")

CASES = [llama("LlamaForCausalLM"), llama("Gemma2ForCausalLM", final_logit_softcapping=7.5), llama("Qwen3ForCausalLM")]
MIXED = ["OPTForCausalLM", "BloomForCausalLM", "MambaForCausalLM", "JambaForCausalLM"]
# Falcon began to read the positions in 5.24.
FALCON = next(case for case in ZOO if case.name == "FalconForCausalLM")
if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
    CASES.append(FALCON)
else:
    MIXED.append(FALCON.name)
LENGTHS = [7, 1, 5, 9]


def sequences():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator) for n in LENGTHS]
    labels = [i.masked_fill(torch.arange(len(i)) < 2, -100) for i in ids]  # of prompts of two tokens
    return ids, labels


def packed(collator=False, **options):
    ids, labels = sequences()
    if collator:
        rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(ids, labels, strict=True)]
        made = transformers.DataCollatorWithFlattening(**options)(rows, return_tensors="pt")
        return {name: value for name, value in made.items() if value is not None}
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "position_ids": positions[None]}


def alone(model):
    """(S,) sums and the log-probs of every token, each sequence in a forward pass of its own."""
    found = []
    for ids, labels in zip(*sequences(), strict=True):
        found.append(token_logprobs(model, {"input_ids": ids[None], "labels": labels[None]})[0])
    return torch.stack([t.sum() for t in found]), torch.cat(found)


@pytest.mark.parametrize("collator", [False, True], ids=["position_ids", "DataCollatorWithFlattening"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_sequence_as_if_alone(case, collator):
    model = build(case)
    sums, tokens = alone(model)
    (sums * torch.arange(1, 5)).sum().backward()
    expected = gradients(model)
    inputs = packed(collator)
    assert_result(token_logprobs(model, inputs)[0], tokens.double().detach())
    got = sequence_logprobs(model, inputs, packed=True)
    assert_result(got, sums.double().detach())
    (got * torch.arange(1, 5)).sum().backward()
    assert_close(gradients(model), expected, bound=2**-16)


def test_labels_that_are_not_given_begin_with_each_sequence():
    model, inputs = build(CASES[0]), packed()
    del inputs["labels"]
    logp = token_logprobs(model, inputs)[0]
    starts = inputs["position_ids"][0] == 0
    assert not logp[starts].any()
    assert (logp[~starts] < 0).all()
    rows = [token_logprobs(model, {"input_ids": ids[None]}).sum() for ids in sequences()[0]]
    torch.testing.assert_close(sequence_logprobs(model, inputs, packed=True), torch.stack(rows))


def test_cumulative_lengths_say_the_same():
    model, inputs = build(CASES[0]), packed()
    expected = sequence_logprobs(model, inputs, packed=True)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    assert sequence_logprobs(model, {**inputs, "cu_seq_lens_q": ends}, packed=True).equal(expected)


def test_several_packed_rows():
    model, inputs = build(CASES[0]), packed()
    twice = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    expected = sequence_logprobs(model, inputs, packed=True)
    torch.testing.assert_close(sequence_logprobs(model, twice, packed=True), torch.cat([expected, expected]))


def test_the_models_own_loss():
    model = build(CASES[0])
    own, expected, loss, got = own_and_fused(model, model, packed(collator=True))
    assert loss == pytest.approx(own, rel=2**-17)
    assert_close(got, expected)


def test_var_over_the_sequences_of_a_row():
    """Rewards per sequence, weights in the batch: cu_seqlens say which row of hidden belongs to which."""
    model, inputs = build(CASES[0]), packed(collator=True, return_flash_attn_kwargs=True)
    rewards, cu_seqlens = torch.tensor([1.0, 0.0, -1.0, 0.5]), inputs["cu_seq_lens_q"]
    labels = inputs.pop("labels")
    loss_fn = VARLoss(lam=0.7, normalizer="batch_mean", reference="none")

    def in_head(hidden, head):
        rows = next_labels(labels, hidden)[0]
        return loss_fn(hidden[0], head.lm_head_weight, rows, rewards, cu_seqlens=cu_seqlens)

    (loss,), _ = capture(model, in_head, inputs)
    loss.backward()
    got = gradients(model)
    counted = torch.tensor([max(n - 2, 0) > 0 for n in LENGTHS])
    weight = torch.softmax((rewards / 0.7).masked_fill(~counted, -torch.inf), 0) * counted.sum()
    sums, _ = alone(model)
    truth = -(weight * sums).sum()
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert_close(got, gradients(model), bound=2**-16)


def test_packed_without_positions_is_refused():
    model, inputs = build(CASES[0]), packed()
    del inputs["position_ids"]
    with pytest.raises(ValueError, match=r"packed=True must come with position_ids.*DataCollatorWithFlattening"):
        sequence_logprobs(model, inputs, packed=True)


# ---- models that do not keep the sequences of a row apart ------------------------------------------------------------


@pytest.mark.parametrize("name", MIXED)
def test_sequences_that_the_model_mixes_are_refused(name):
    model = build(next(case for case in ZOO if case.name == name))
    with pytest.raises(ValueError, match=rf"position_ids must be .*{name} depend on .*; pad the sequences"):
        sequence_logprobs(model, packed(), packed=True)
    with pytest.raises(ValueError, match="position_ids must be those of one sequence per row"):
        token_logprobs(model, packed())
    ids = sequences()[0][0][None]  # one in a row is no matter
    one = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    assert token_logprobs(model, one).equal(token_logprobs(model, {"input_ids": ids}))


def test_an_attention_mask_that_hides_the_positions():
    model, inputs = build(CASES[0]), packed()
    expected = sequence_logprobs(model, inputs, packed=True)
    ones = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match="leave attention_mask out"):
        sequence_logprobs(model, {**inputs, "attention_mask": ones}, packed=True)
    sequence = (inputs["position_ids"][0] == 0).cumsum(0)
    whole = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence)).tril().bool()
    got = sequence_logprobs(model, {**inputs, "attention_mask": whole[None, None]}, packed=True)
    assert_result(got, expected.double().detach())


def test_padding_on_the_left_with_positions_is_one_sequence():
    model, ids = build(CASES[0]), sequences()[0][0]
    mask = torch.tensor([[0, 0, 0] + [1] * len(ids)])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    inputs = {"input_ids": torch.cat([ids[:3], ids])[None], "attention_mask": mask, "position_ids": positions}
    assert_result(token_logprobs(model, inputs)[0, 3:], token_logprobs(model, {"input_ids": ids[None]})[0].double())


def test_cumulative_lengths_alone_need_flash_attention():
    model, inputs = build(CASES[0]), packed()
    del inputs["position_ids"]
    ends = torch.tensor([0, 7, 8, 13, 22], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass position_ids"):
        sequence_logprobs(model, {**inputs, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, packed=True)


def test_every_name_of_the_collator():
    model, inputs = build(CASES[0]), packed(collator=True, return_flash_attn_kwargs=True)
    assert inputs["max_length_q"] == max(LENGTHS)
    assert_result(sequence_logprobs(model, inputs, packed=True), alone(model)[0].double().detach())


def test_positions_that_begin_elsewhere():
    """Models of RoBERTa's kind count from padding_idx + 1; a sequence of one token repeats its number."""
    starts = sequence_starts({**packed(), "position_ids": packed()["position_ids"] + 2})
    assert starts.equal(sequence_starts(packed()))
    assert starts.sum() == len(LENGTHS)
