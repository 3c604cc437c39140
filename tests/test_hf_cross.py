"""cross_reference_logprobs against one plain forward pass per (prompt, completion)."""

import pytest
import torch

from tests.hf_zoo import VOCAB, ZOO, batch, build, llama
from var_kernels.integrations.hf import cross, cross_reference_logprobs
from var_kernels.losses import var_weights

transformers = pytest.importorskip("transformers")

PROMPTS = [[3, 5, 7, 9, 11, 4, 6], [8, 3], [12, 13, 14, 15], [8, 3]]
COMPLETIONS = [[20, 21, 22, 2], [30], [40, 41, 42, 43, 44, 45, 46, 2], [31, 2]]
LLAMA = llama("LlamaForCausalLM")

# Caches of recurrent states cannot be continued: full passes instead.
FALLBACK = {"FalconH1ForCausalLM", "MambaForCausalLM", "RecurrentGemmaForCausalLM", "Qwen3NextForCausalLM"}
CACHED = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "BartForCausalLM",
    "CohereForCausalLM",
}
CASES = [c for c in ZOO if c.name in FALLBACK | CACHED and not c.variant and hasattr(transformers, c.name)]


def plain_scores(model, prompts=PROMPTS, completions=COMPLETIONS):
    scores = torch.zeros(len(prompts), len(completions), dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        for j, completion in enumerate(completions):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits.double().log_softmax(-1)[0]
            scores[i, j] = sum(logits[len(prompt) - 1 + t, token] for t, token in enumerate(completion))
    return scores


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_plain_forward_passes(case):
    model = build(case)
    expected = plain_scores(model)
    scores = cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert (scores - expected).abs().max() <= 1e-4
    assert bool(cross._cache_trust[model]) == (case.name in CACHED)
    assert (cross_reference_logprobs(model, PROMPTS, COMPLETIONS) - expected).abs().max() <= 1e-4
    assert (cross_reference_logprobs(model, PROMPTS, COMPLETIONS, max_tokens=1) - expected).abs().max() <= 1e-4


def test_each_distinct_prompt_runs_once():
    model = build(LLAMA)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    seen.clear()
    cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    # the completion of one token is scored by the prompt's pass alone
    assert seen == [(1, 7), (3, 7), (1, 4), (3, 7), (1, 2), (3, 7)]
    seen.clear()
    cross_reference_logprobs(model, PROMPTS[:1], COMPLETIONS, max_tokens=2 * (7 + 8))
    assert seen == [(1, 7), (2, 7), (1, 1)]


def test_a_longer_prompt_is_verified_again_and_a_wrong_cache_is_not_used():
    model = build(llama("MistralForCausalLM", sliding_window=64))
    cross_reference_logprobs(model, [[8, 3]], COMPLETIONS)
    assert cross._cache_trust[model] == 2
    attention = model.model.layers[0].self_attn
    plain_forward = attention.forward

    def forgets_the_cache(*args, **kwargs):
        name = "cache" if "cache" in kwargs else "past_key_values"
        return plain_forward(*args, **{**kwargs, name: None, "attention_mask": None})

    attention.forward = forgets_the_cache
    scores = cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    assert cross._cache_trust[model] == 0
    assert (scores - plain_scores(model)).abs().max() <= 1e-4


def test_any_number_of_prompts_and_tensors():
    model = build(LLAMA)
    scores = cross_reference_logprobs(model, [torch.tensor(p) for p in PROMPTS[:3]], tuple(map(tuple, COMPLETIONS[:2])))
    assert (scores - plain_scores(model, PROMPTS[:3], COMPLETIONS[:2])).abs().max() <= 1e-4
    assert cross_reference_logprobs(model, PROMPTS, []).shape == (4, 0)
    assert cross_reference_logprobs(model, [], COMPLETIONS).shape == (0, 4)


def test_mode_and_random_state_are_kept_and_dropout_is_off():
    model = build(llama("LlamaForCausalLM", attention_dropout=0.5))
    expected = plain_scores(model)
    model.train()
    state = torch.get_rng_state()
    scores = cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    assert model.training
    assert torch.get_rng_state().equal(state)
    assert (scores - expected).abs().max() <= 1e-4


def test_bf16_uses_the_cache():
    model = build(LLAMA).bfloat16()
    scores = cross_reference_logprobs(model, PROMPTS, COMPLETIONS)
    assert cross._cache_trust[model] == 7
    assert (scores - plain_scores(model)).abs().max() <= 0.5


def test_feeds_the_cross_normaliser():
    model = build(LLAMA)
    scores = cross_reference_logprobs(model, PROMPTS[:3], COMPLETIONS[:3])
    rewards = torch.tensor([[1.0, 0.0, 0.5]]).expand(3, 3)
    weights = var_weights(rewards, scores, lam=2.0, normalizer="cross", reference="sum")
    terms = scores.double() + rewards.double() / 2.0
    expected = (terms.diagonal() - terms.logsumexp(1)).exp()
    assert (weights.weight - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "words"),
    [
        ([[1], []], [[2]], {}, r"prompts\[1\].*BOS"),
        ([[1]], [[2], []], {}, r"completions\[1\].*EOS"),
        ([torch.ones(1, 3, dtype=torch.long)], [[2]], {}, r"prompts\[0\].*1-D.*\(1, 3\)"),
        ([[1]], [torch.ones(3)], {}, r"completions\[0\].*float32"),
        ([[1]], [[2]], {"max_tokens": 0}, "max_tokens"),
        ([[1]], [[VOCAB + 3]], {}, "labels must be in"),
    ],
)
def test_bad_input(prompts, completions, options, words):
    model = build(LLAMA)
    with pytest.raises(ValueError, match=words):
        cross_reference_logprobs(model, prompts, completions, **options)
    assert model(**batch()).loss > 0
