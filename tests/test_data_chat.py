"""Chat templates that mark the assistant's text by {% generation %}: only its tokens have labels."""

import copy
import dataclasses
from itertools import chain

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.tiny_training import losses, tiny_config, tiny_model, tokenizer
from var_kernels.integrations.data import DataError, Example, encode_examples
from var_kernels.integrations.trainer import VARTrainer
from var_kernels.integrations.trainer.reference import rows_fingerprint


def message(role, content):
    return {"role": role, "content": content}


def _ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


TURNS = [message("user", "hi"), message("assistant", "yo"), message("user", "bye"), message("assistant", "ciao")]
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template):
    chat = copy.deepcopy(tokenizer())
    chat.chat_template = template
    return chat


def trained_text(row):
    return tokenizer().decode(row["input_ids"][row["labels"] != -100])


def test_a_marked_template_trains_the_assistants_turns_alone():
    chat = chat_tokenizer(MARKED)
    example = Example(TURNS[:1], [TURNS[1:], TURNS[3:]], [1.0, 0.0], ["a", "b"])
    rows = encode_examples([example], chat, 128)
    parts = ["yo<eos>", "\n[user]bye<eos>\n[assistant]", "ciao<eos>", "\n"]
    ids = [_ids(part) for part in parts]
    row = rows.row(0)
    assert row["input_ids"].tolist() == _ids("[user]hi<eos>\n[assistant]") + list(chain(*ids))
    labels = [part if number % 2 == 0 else [-100] * len(part) for number, part in enumerate(ids)]
    assert row["labels"].tolist() == [-100] * len(_ids("[user]hi<eos>\n[assistant]")) + list(chain(*labels))
    # transformers' own mask marks the same text
    whole = chat.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, kept in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if kept]
    assert trained_text(row) == tokenizer().decode(marked) == "yo<eos>ciao<eos>"
    assert trained_text(rows.row(1)) == "ciao<eos>"
    unlabelled = dataclasses.replace(rows, others=None)
    assert rows_fingerprint(unlabelled) != rows_fingerprint(rows)  # other log-probs of the reference


def test_a_marked_conversation_is_cut_with_its_labels():
    example = Example(TURNS[:1], [TURNS[1:]], [1.0], ["here"])
    whole = encode_examples([example], chat_tokenizer(MARKED), 128).row(0)
    for length in (8, 20, 30):
        rows = encode_examples([example], chat_tokenizer(MARKED), length)
        row, prompt = rows.row(0), int(rows.prompt_length[0])
        cut = len(_ids("[user]hi<eos>\n[assistant]")) - prompt
        assert row["input_ids"].tolist() == whole["input_ids"][cut : cut + length].tolist()
        assert row["labels"].tolist() == whole["labels"][cut : cut + length].tolist()
        assert trained_text(row).startswith("yo")


def test_a_completion_that_keeps_no_token_of_the_assistant_is_named():
    turns = [message("user", "hi"), message("tool", "x" * 40), message("assistant", "yo")]
    example = Example(turns[:1], [turns[1:]], [1.0], ["here"])
    assert trained_text(encode_examples([example], chat_tokenizer(MARKED), 128).row(0)) == "yo<eos>"
    with pytest.raises(DataError, match=r"here: the completion keeps no token.*raise max_length"):
        encode_examples([example], chat_tokenizer(MARKED), 16)


def test_turns_of_others_need_a_marked_template():
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    example = Example(TURNS[:1], [TURNS[1:]], [1.0], ["here"])
    with pytest.raises(
        DataError, match=r"here: the completion holds messages of user.*\{% generation %\}.*the prompt end"
    ):
        encode_examples([example], chat_tokenizer(unmarked), 128)
    last = encode_examples([Example(TURNS[:3], [TURNS[3:]], [1.0], ["here"])], chat_tokenizer(unmarked), 128)
    assert trained_text(last.row(0)) == "ciao<eos>\n"


def test_training_on_marked_turns_weighs_the_assistants_tokens_alone(tmp_path):
    """Sums, lengths and the reference's log-probs are of the labelled tokens."""
    texts = (("yo", "ciao"), ("well", "no"), ("a", "bb"))
    turns = [[TURNS[0], message("assistant", a), TURNS[2], message("assistant", b)] for a, b in texts]
    rows = [{"prompt": t[:1], "completion": t[1:], "reward": float(i)} for i, t in enumerate(turns)]
    config = tiny_config(tmp_path, max_length=64, per_device_train_batch_size=3)
    trainer = VARTrainer(tiny_model(), config, rows, processing_class=chat_tokenizer(MARKED))
    table, score = trainer.train_dataset.rows, []
    for number in range(3):
        row = table.row(number)
        kept = row["labels"] != -100
        with torch.no_grad():
            logp = trainer.model(row["input_ids"][None]).logits[0].log_softmax(-1)
        s = logp[:-1][kept[1:]].gather(1, row["labels"][kept][:, None]).sum()
        assert table.columns["ref_logp"][number].item() == pytest.approx(s.item(), rel=1e-6)
        score.append((s, s / kept.sum() + number / 0.5))
    trainer.train()
    weight = torch.stack([value for _, value in score]).softmax(0)
    assert losses(trainer)[0] == pytest.approx(-(weight * torch.stack([s for s, _ in score])).sum().item(), rel=1e-6)
