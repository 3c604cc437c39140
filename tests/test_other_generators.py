"""Completions of another engine in online training: its log-probs, truncated importance weights, a fake vLLM server;
and rewards from a fake judge."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.test_online import SAMPLER, naive_logp
from tests.tiny_online import buffered, online_trainer, trained
from tests.tiny_training import losses, tiny_model
from var_kernels import linear_loss
from var_kernels.integrations.trainer.online import Samples

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logps_of(model, prompt, ids):
    logp = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return logp[torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]


def shifted(model, prompts, *, n, **options):
    """Draws of the policy, by an engine that finds each token 0.5 nats less, or 0.25 more likely, in turn."""
    made = SAMPLER(model, prompts, n=n, **options)
    logps = [
        [
            [min(0.0, lp - (0.5, -0.25)[t % 2]) for t, lp in enumerate(logps_of(model, prompt, ids).tolist())]
            for ids in of
        ]
        for prompt, of in zip(prompts, made, strict=True)
    ]
    return Samples(made, logps)


def test_the_step_is_weighed_by_truncated_ratios(tmp_path):
    """An on-policy step of PPO, by fp64 full logits: each token's -A log pi times min(exp(lp - lp_sampler), cap)."""
    trainer = trained(tmp_path, method="ppo", iterations=1, steps_per_iteration=1, optim="sgd", learning_rate=0.1,
                      importance_cap=1.3, trainer_options={"sampler": shifted})  # fmt: skip
    model, loss, gaps = tiny_model(), 0.0, []
    for row in buffered(tmp_path, 0):
        reward = torch.tensor(row["rewards"], dtype=torch.float64)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4) if reward.std() > 0 else 0 * reward
        for k in range(3):
            logp, drawn = naive_logp(model, row, k), torch.tensor(row["completion_logps"][k])
            weight = (logp.detach() - drawn).exp().clamp(max=1.3)
            gaps += (logp.detach() - drawn).abs().tolist()
            loss = loss - advantage[k] * (weight * logp).mean() / 12
    loss.backward()
    moved = (tiny_model().lm_head.weight - trainer.model.lm_head.weight) / 0.1
    torch.testing.assert_close(moved.detach(), model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    logged = [entry["sampler_logp_gap"] for entry in trainer.state.log_history if "sampler_logp_gap" in entry]
    assert logged == [pytest.approx(sum(gaps) / len(gaps), rel=1e-4)]
    column = trainer.train_dataset.rows.token_columns["sampler_weight"]
    assert column.max() == pytest.approx(1.3)
    assert 0.7 < column.min() < 0.8  # exp(-0.25)


def test_log_probs_come_along_without_weights_and_survive_a_kill(tmp_path):
    """They are kept in the buffer and change nothing; an iteration that was killed while drawing is drawn again."""
    calls = []

    def dying(model, prompts, **options):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return shifted(model, prompts, **options)

    options = {"method": "grpo", "iterations": 1, "steps_per_iteration": 1, "sampling_batch_size": 6}
    with pytest.raises(KeyboardInterrupt):
        online_trainer(tmp_path / "b", trainer_options={"sampler": dying}, **options).train()
    plain = trained(tmp_path / "a", **options)
    again = trained(tmp_path / "b", trainer_options={"sampler": dying}, **options)
    assert len(calls) == 4  # both batches, of which one had been drawn before the kill
    assert losses(again) == losses(plain)
    rows = buffered(tmp_path / "b", 0)
    assert all(
        len(i) == len(lp) for r in rows for i, lp in zip(r["completion_ids"], r["completion_logps"], strict=True)
    )


def test_a_weight_for_each_token():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, 8, generator=draw).requires_grad_(), torch.randn(31, 8, generator=draw)
    labels = torch.randint(0, 31, (2, 4), generator=draw)
    inputs = {"old_token_logp": -3 + torch.randn(2, 4, generator=draw), "advantage": torch.randn(2, generator=draw)}
    shares = torch.rand(2, 4, generator=draw)
    loss = linear_loss("ppo", hidden, weight, labels, inputs, item_weight=shares)
    parts = []
    for place in range(8):  # each token by itself
        one = torch.zeros(8)
        one[place] = shares.view(-1)[place]
        parts.append(linear_loss("ppo", hidden, weight, labels, inputs, item_weight=one.view(2, 4)))
    torch.testing.assert_close(loss, sum(parts))
    with pytest.raises(ValueError, match="item_weight must be"):
        linear_loss("sft", hidden, weight, labels, item_weight=shares)


REFUSED = {
    "no sampler": ({"method": "ppo"}, None, "importance_cap must be None without a sampler, got 2.0; the model's own"),
    "sequences": ({"method": "gspo"}, shifted, "importance_cap must be None for method 'gspo', .* losses of tokens"),
    "zero": ({"method": "ppo", "importance_cap": 0.0}, shifted, "importance_cap must be finite and > 0, got 0.0"),
    "temperature": ({"method": "ppo", "logp_temperature": 0.5}, shifted, "logp_temperature must be that of the draws"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    options, sampler, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        online_trainer(tmp_path, trainer_options={"sampler": sampler}, **{"importance_cap": 2.0, **options})


@pytest.mark.parametrize(("logps", "message"), [
    (None, "importance_cap: the sampler must return log-probs of its draws, got none; return Samples with logps"),
    ([[[-1.0]] * 3] * 2, r"logps of prompt 0 must be \[2, 2, 2\] numbers, got \[1, 1, 1\]; one a token"),
    ([[[-1.0, 0.5]] * 3] * 2, "must be finite and <= 0, got 0.5; nats"),
    ([[[-1.0, float("nan")]] * 3] * 2, "must be finite and <= 0, got nan"),
])  # fmt: skip
def test_log_probs_that_are_none(logps, message, tmp_path):
    def sampler(model, prompts, **options):
        return Samples([[[5, 1]] * 3] * len(prompts), logps)

    trainer = online_trainer(tmp_path, method="ppo", importance_cap=2.0, trainer_options={"sampler": sampler})
    with pytest.raises(ValueError, match=message):
        trainer.train()


# ---- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """answers: path -> what is sent for a request's body. ``seen``: the requests."""

    class Handler(BaseHTTPRequestHandler):
        answers, seen = {}, []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append((self.path, body))
            made = self.answers[self.path](body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(made.encode() if isinstance(made, str) else json.dumps(made).encode())

        def log_message(self, *_):
            pass

    serving = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    Handler.url = f"http://127.0.0.1:{serving.server_port}"
    yield Handler
    serving.shutdown()
    thread.join()


def test_the_vllm_example_trains_an_adapter_on_what_the_server_draws(server, tmp_path):
    """A server of the same protocol: each iteration's adapter is loaded before it draws, the one before it let go."""
    peft = pytest.importorskip("peft")
    policies = {}

    def load(body):
        policies[body["lora_name"]] = peft.PeftModel.from_pretrained(tiny_model(), body["lora_path"])
        return "Success"

    def complete(body):
        model = policies[body["model"]]
        options = {"temperature": body["temperature"], "max_new_tokens": body["max_tokens"], "seed": body["seed"]}
        made = shifted(model, body["prompt"], n=body["n"], **options)
        pairs = [(ids, lp) for both in zip(*made, strict=True) for ids, lp in zip(*both, strict=True)]
        return {"choices": [
            {"index": i, "token_ids": ids, "logprobs": {"token_logprobs": lp}} for i, (ids, lp) in enumerate(pairs)
        ][::-1]}  # fmt: skip

    server.answers |= {
        "/v1/load_lora_adapter": load,
        "/v1/unload_lora_adapter": lambda body: policies.pop(body["lora_name"]) and "Success",
        "/v1/completions": complete,
    }
    sampler = example("vllm_sampler").VLLMSampler(server.url, tmp_path / "adapters")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    options = {"sampler": sampler, "peft_config": adapter}
    trainer = trained(tmp_path, method="grpo", iterations=2, steps_per_iteration=1, importance_cap=2.0,
                      trainer_options=options)  # fmt: skip
    assert all(value == value for value in losses(trainer))
    assert len(policies) == 1  # the second iteration's
    paths = [path.rsplit("/", 1)[1] for path, _ in server.seen]
    assert paths.count("load_lora_adapter") == 2
    assert paths.count("unload_lora_adapter") == 1
    # what it drew is what the policy of its iteration would have drawn, up to the engine's own probabilities
    row, index = buffered(tmp_path, 1)[0], trainer.train_dataset.rows.groups[0][0]
    exact = logps_of(next(iter(policies.values())), row["prompt_ids"], row["completion_ids"][0])
    item = trainer.train_dataset.rows.row(index)
    torch.testing.assert_close(item["old_token_logp"][item["labels"] != -100].double(), exact, rtol=1e-5, atol=1e-5)


def test_the_vllm_example_says_what_failed(server):
    sampler = example("vllm_sampler").VLLMSampler("http://127.0.0.1:9", "adapters")
    with pytest.raises(RuntimeError, match="vLLM: no server at"):
        sampler._post("completions", {})


def test_the_judge_example(server, monkeypatch):
    replies = iter(["7", "Score: 12/10", "no idea"])
    server.answers["/v1/chat/completions"] = lambda body: {"choices": [{"message": {"content": next(replies)}}]}
    monkeypatch.setenv("JUDGE_URL", server.url)
    judge = example("reward_server")
    assert judge.judge("2 + 2?", "4") == 0.7
    assert judge.judge("2 + 2?", "four") == 1.0
    with pytest.raises(ValueError, match="the judge gave no number: 'no idea'"):
        judge.score([[{"role": "user", "content": "2 + 2?"}]], ["5"])
    assert "Question: 2 + 2?\n\nAnswer: 5" in server.seen[-1][1]["messages"][0]["content"]
