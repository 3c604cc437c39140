"""A loss that is NaN or infinite stops the training before it reaches a weight, on every rank, and names the rows."""

import pytest
import torch

pytest.importorskip("transformers")

from tests.ranks import run_ranks
from tests.tiny_training import ROWS, tiny_model, tiny_trainer, tokenizer
from var_kernels.integrations.trainer import NonFiniteLossError

BAD = {"prompt": "3 + 2 = ", "completions": ["5", "xxx"], "rewards": [1.0, 0.5]}
DATA = [{**row, "completions": row["completions"][:2], "rewards": row["rewards"][:2]} for row in ROWS[:4]] + [BAD]
NAMED = r"train_dataset row 5(?!.*row [1-4])"  # that row and no other
OPTIONS = {"learning_rate": 0.1, "per_device_train_batch_size": 10}


def token_of_the_bad_row() -> int:
    texts = [text for row in DATA for text in (row["prompt"], *row["completions"]) if text != "xxx"]
    return (set(tokenizer().encode("xxx")) - {token for text in texts for token in tokenizer().encode(text)}).pop()


def model_that_overflows():
    """NaN for every text with that token."""
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[token_of_the_bad_row()] = torch.nan
    return model


def model_that_forbids():
    """-inf for that token as a label."""
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False)
    head = torch.nn.Linear(24, len(tokenizer()))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[token_of_the_bad_row()] = -torch.inf
    model.lm_head = head
    return model


CASES = {
    "sft, nan": (model_that_overflows, {"method": "sft", "sft_on": "all"}, f"loss is nan.*{NAMED}.*nan"),
    "sft, -inf": (model_that_forbids, {"method": "sft", "sft_on": "all"}, f"loss is inf.*{NAMED}.*-inf"),
    "weighted_bc, -inf": (model_that_forbids, {"method": "weighted_bc"}, f"loss is inf.*{NAMED}"),
    "ava_d, -inf": (model_that_forbids, {"method": "ava_d", "sft_on": "all"}, f"loss is (inf|nan).*{NAMED}"),
    "bradley_terry, nan": (model_that_overflows, {"method": "bradley_terry"}, f"loss is nan.*{NAMED}"),
    "accumulated": (
        model_that_overflows,
        {"method": "sft", "sft_on": "all", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 10},
        "step 1: the loss is nan.*No row's log-prob is finite",  # the micro-batch is that row alone
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_stops_before_a_weight_moves(case, tmp_path):
    make_model, options, message = CASES[case]
    model = make_model()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trainer = tiny_trainer(tmp_path, DATA, model=model, **{**OPTIONS, **options})
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.train()
    for name, values in before.items():
        torch.testing.assert_close(model.state_dict()[name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["dpo", "kto", "dro", "exo", "target_po"])
def test_a_run_that_diverges_says_so(method, tmp_path):
    trainer = tiny_trainer(tmp_path, DATA, method=method, max_steps=3, learning_rate=1e300)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*weights have diverged.*lower learning rate"):
        trainer.train()


def test_a_loss_that_overflows_by_itself_blames_no_row(tmp_path):
    trainer = tiny_trainer(tmp_path, DATA, method="dpo", beta=1e308)
    trainer.train_dataset.rows.columns["ref_logp"] -= torch.tensor([0.0, 10.0] * 5)
    with pytest.raises(NonFiniteLossError, match=r"loss is inf; .*Every row's log-prob is finite"):
        trainer.train()


def run_rank(rank, world, folder):
    options = {"method": "sft", "sft_on": "all", **OPTIONS, "per_device_train_batch_size": 5, "ddp_backend": "gloo"}
    trainer = tiny_trainer(folder, DATA, model=model_that_overflows(), **options)
    with pytest.raises(NonFiniteLossError, match=NAMED):  # the same on both, though one alone has the row
        trainer.train()


def test_every_rank_stops(tmp_path):
    run_ranks(run_rank, 2, tmp_path)
