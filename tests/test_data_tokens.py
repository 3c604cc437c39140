"""Where a row's tokens begin and end, what a cut leaves of it, and that TRL makes the same of the same rows."""

import copy
import logging

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.tiny_training import tiny_config, tiny_model, tokenizer
from var_kernels.integrations.data import DataError, encode_examples, encode_prompts, end_tokens, merge_prompts
from var_kernels.integrations.data import parse_row as parsed
from var_kernels.integrations.trainer import VARTrainer

NUMBERS = " ".join(map(str, range(30)))
SPECIAL = ["<unk>", "<bos>", "<eos>", "<pad>", "[gMASK]", "<sop>", "<|im_start|>", "<|im_end|>", "<sep>"]
# What comes before and behind a text, by the tokenizer's own rule.
KINDS = {
    "adds bos": (["<bos>"], []),
    "adds eos": ([], ["<eos>"]),
    "adds both": (["<bos>"], ["<eos>"]),
    "adds none": ([], []),
    "adds two before": (["[gMASK]", "<sop>"], []),
    "adds bos and a separator": (["<bos>"], ["<sep>"]),
}


def words(kind="adds bos", **options):
    """A tokenizer of whole words (and of single characters, line ends among them) that adds what ``KINDS`` says."""
    before, behind = KINDS[kind]
    texts = ["user:", "2+2?", "hi", "yo", "bye", "ciao", "no", "\n", *map(str, range(100)), *"[]:;"]
    texts += ["system", "user", "assistant", "tool", "calls", "think", "a"]
    vocabulary = {text: number for number, text in enumerate(dict.fromkeys([*SPECIAL, *texts]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"),
         pre_tokenizers.Split("[", "isolated"), pre_tokenizers.Split("]", "isolated")]
    )  # fmt: skip
    made.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind], special_tokens=[(token, vocabulary[token]) for token in SPECIAL]
    )
    made.decoder = decoders.Fuse()
    given = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=["[gMASK]", "<sop>", "<|im_start|>", "<|im_end|>"], **given
    )


def ids_of(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


def encoded(rows, tok, max_length=1000, ends=()):
    return encode_examples(
        merge_prompts(parsed(row, f"row {n}") for n, row in enumerate(rows, 1)), tok, max_length, ends
    )


def tokens(rows, tok, number=0):
    return tok.convert_ids_to_tokens(rows.row(number)["input_ids"].tolist())


def prompt_of(rows, number):
    return rows.row(number)["input_ids"][: int(rows.prompt_length[number])].tolist()


# ---- begin and end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", ["nothing", "begin", "end", "both"])
def test_a_text_begins_and_ends_once_whatever_it_holds_already(kind, held):
    tok = words(kind)
    before = KINDS[kind][0]
    prompt = "".join(before) + "user: hi" if held in ("begin", "both") else "user: hi"
    completion = "yo<eos>" if held in ("end", "both") else "yo"
    rows = encoded([{"prompt": prompt, "completion": completion}], tok)
    assert tokens(rows, tok) == [*before, "user:", "hi", "yo", "<eos>"]
    assert rows.row(0)["labels"].tolist()[-2:] == tok.convert_tokens_to_ids(["yo", "<eos>"])
    assert (rows.row(0)["labels"][:-2] == -100).all()


@pytest.mark.parametrize(
    ("kind", "prompt", "expected"),
    [
        ("adds none", "<bos>hi", ["<bos>", "hi"]),  # the text's own begin token stays
        ("adds two before", "<sop>hi", ["[gMASK]", "<sop>", "hi"]),  # half of what the tokenizer adds
        ("adds two before", "[gMASK]<sop>hi", ["[gMASK]", "<sop>", "hi"]),
        ("adds bos", "<bos>", ["<bos>"]),
    ],
)
def test_a_prompt_that_holds_some_of_its_begin_tokens(kind, prompt, expected):
    tok = words(kind)
    assert tokens(encoded([{"prompt": prompt, "completion": "yo"}], tok), tok) == [*expected, "yo", "<eos>"]


@pytest.mark.parametrize(
    ("completion", "ends", "expected"),
    [
        ("yo<|im_end|>", ["<|im_end|>"], ["yo", "<|im_end|>"]),
        ("yo<|im_end|>\n", ["<|im_end|>"], ["yo", "<|im_end|>", "\n"]),
        ("yo<eos>\n", [], ["yo", "<eos>", "\n"]),
        ("yo<|im_end|>", [], ["yo", "<|im_end|>", "<eos>"]),  # no end token of this model
        ("yo<eos>no", [], ["yo", "<eos>", "no", "<eos>"]),
        ("<eos>", [], ["<eos>"]),
        ("", [], ["<eos>"]),
    ],
)  # fmt: skip
def test_a_completion_that_ends_with_an_end_token_gets_no_other(completion, ends, expected):
    tok = words()
    rows = encoded([{"prompt": "hi", "completion": completion}], tok, ends=tok.convert_tokens_to_ids(ends))
    assert tokens(rows, tok) == ["<bos>", "hi", *expected]


def test_end_tokens_are_those_of_the_generation_settings_and_of_the_tokenizer():
    model = tiny_model()
    assert end_tokens(tokenizer()) == (1,)
    model.generation_config = GenerationConfig(eos_token_id=[7, 1])
    assert end_tokens(tokenizer(), model) == (7, 1)
    model.generation_config = GenerationConfig(eos_token_id=7)
    assert end_tokens(tokenizer(), model) == (7, 1)


def test_the_trainer_knows_the_end_tokens_of_its_model(tmp_path):
    tok = copy.deepcopy(tokenizer())
    model = tiny_model()
    (seven,) = ids_of(tok, "7")
    model.generation_config.eos_token_id = [seven, 1]
    rows = [{"prompt": "3 + 4 = ", "completion": text, "reward": float(text)} for text in ("7", "8")]
    made = VARTrainer(model, tiny_config(tmp_path), rows, processing_class=tok).train_dataset.rows
    assert made.row(0)["input_ids"].tolist()[-1] == seven
    assert made.row(1)["input_ids"].tolist()[-2:] == [*ids_of(tok, "8"), 1]


def test_where_pad_is_the_end_token_and_padding_is_on_the_left_nothing_changes():
    rows = [{"prompt": "user: hi", "completion": "yo"}, {"prompt": "hi", "completion": "no no no"}]
    plain, other = encoded(rows, words()), encoded(rows, words(pad_token="<eos>", padding_side="left"))
    assert plain.token_ids.tolist() == other.token_ids.tolist()
    assert plain.row(0)["labels"].tolist() == other.row(0)["labels"].tolist()


# ---- a cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_prompt_keeps_its_begin_tokens_and_its_newest(kind):
    tok = words(kind)
    before = KINDS[kind][0]
    rows = encoded([{"prompt": NUMBERS, "completion": "yo"}], tok, 12)
    newest = [str(n) for n in range(30)][len(before) - 10 :]
    assert tokens(rows, tok) == [*before, *newest, "yo", "<eos>"]
    assert (rows.cut_prompts, rows.cut_completions) == (1, 0)
    room, cut = encode_prompts([parsed({"prompt": NUMBERS, "completion": ""}, "")], tok, 10)
    assert tok.convert_ids_to_tokens(room[0]) == [*before, *newest]
    assert cut == 1


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("kind", "opening", "kept"),
    [
        ("adds bos", "<bos>", ["<bos>"]),  # the template writes it, and the tokenizer must not add another
        ("adds bos", "{{ bos_token }}", ["<bos>"]),
        ("adds none", "<bos>", ["<bos>"]),
        ("adds two before", "[gMASK]<sop>", ["[gMASK]", "<sop>"]),
        ("adds none", "[gMASK]<sop>", ["[gMASK]", "<sop>"]),  # the template's alone
        ("adds bos", "<bos><sop>", ["<bos>", "<sop>"]),
        ("adds bos", "", []),  # a template without one: <|im_start|> begins every message, not the text
    ],
)
def test_a_cut_conversation_keeps_its_begin_tokens_and_its_newest(kind, opening, kept):
    tok = words(kind)
    tok.chat_template = opening + CHATML
    row = {"prompt": [{"role": "user", "content": NUMBERS}], "completion": [{"role": "assistant", "content": "yo"}]}
    whole = tokens(encoded([row], tok), tok)
    assert whole[: len(kept) + 2] == [*kept, "<|im_start|>", "user"]
    assert whole.count("<bos>") == kept.count("<bos>")
    rows = encoded([row], tok, 15)
    assert tokens(rows, tok) == [*kept, *whole[len(whole) - 15 + len(kept) :]]
    room, _ = encode_prompts([parsed(row, "")], tok, 12)
    assert room[0] == prompt_of(rows, 0)


def test_a_completion_that_is_cut_has_no_end_token():
    tok = words()
    for completion in (NUMBERS, f"{NUMBERS}<eos>"):
        rows = encoded([{"prompt": "hi", "completion": completion}], tok, 10)
        assert tokens(rows, tok) == ["<bos>", "hi", *map(str, range(8))]
        assert rows.cut_completions == 1


PAIR = {"prompt": NUMBERS, "chosen": " ".join(["yo"] * 20), "rejected": "no"}


@pytest.mark.parametrize(
    "rows",
    [
        [PAIR],
        [{"prompt": NUMBERS, "completions": [PAIR["chosen"], "no", "hi yo"]}],
        [{"prompt": NUMBERS, "completion": PAIR[key], "label": key == "chosen"} for key in ("chosen", "rejected")],
        [{**PAIR, "chosen": "yo"}, PAIR],  # two pairs of one prompt
    ],
    ids=["pair", "several", "judged", "two pairs"],
)  # fmt: skip
def test_completions_of_a_prompt_are_cut_under_the_same_tokens_of_it(rows):
    tok = words()
    table = encoded(rows, tok, 40)
    prompts = [prompt_of(table, row) for row in range(len(table))]
    assert all(prompt == prompts[0] for prompt in prompts)
    assert tok.convert_ids_to_tokens(prompts[0]) == ["<bos>", *map(str, range(11, 30))]  # half of 40
    # encoded one by one, without merging, they are cut alike, too
    examples = [parsed(row, "here") for row in rows]
    assert encode_examples(examples, tok, 40).token_ids.tolist() == table.token_ids.tolist()


def test_a_conversation_of_a_pair_is_cut_alike():
    tok = words()
    tok.chat_template = "<bos>" + CHATML
    row = {key: [{"role": "assistant", "content": PAIR[key]}] for key in ("chosen", "rejected")}
    table = encoded([{"prompt": [{"role": "user", "content": NUMBERS}], **row}], tok, 40)
    assert prompt_of(table, 0) == prompt_of(table, 1)
    assert prompt_of(table, 0)[:1] == [tok.bos_token_id]
    assert len(prompt_of(table, 0)) == 20


def test_pairs_that_a_cut_makes_equal_are_named_and_left_out(tmp_path, caplog):
    """Their loss would be ln 2, whatever the policy. An equal pair of the data says as little."""
    rows = [
        {"prompt": "1 + 2 = ", "chosen": "x" * 40 + "3", "rejected": "x" * 40 + "4"},
        {"prompt": "1 + 3 = ", "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 3 = ", "chosen": "5", "rejected": "5"},
    ]
    for method in ("dpo", "kto"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            config = tiny_config(tmp_path, method=method, max_length=24)
            trainer = VARTrainer(tiny_model(), config, rows, processing_class=tokenizer())
        assert [row for item in trainer.train_dataset.items for row in item] == [2, 3]
        assert "2 of 3 pairs hold the same tokens twice, at most max_length = 24" in caplog.text
        assert "left out: train_dataset row 1, train_dataset row 3" in caplog.text
        message = "no prompt has two completions with different" if method == "dpo" else "got none .*raise max_length"
        with pytest.raises(ValueError, match=message):
            VARTrainer(tiny_model(), config, rows[:1], processing_class=tokenizer())


def test_the_best_and_the_worst_of_a_prompt_must_differ_within_max_length(tmp_path, caplog):
    rows = [
        {"prompt": "1 + 2 = ", "completions": ["x" * 40 + "3", "x" * 40 + "4"], "rewards": [1.0, 0.0]},
        {"prompt": "1 + 3 = ", "completions": ["4", "5"], "rewards": [1.0, 0.0]},
    ]
    config = tiny_config(tmp_path, method="dpo", max_length=24)
    assert VARTrainer(tiny_model(), config, rows, processing_class=tokenizer()).train_dataset.items == [[2, 3]]
    assert "1 of 2 pairs hold the same tokens twice" in caplog.text


def test_a_prompt_without_a_token_is_named():
    tok = words("adds none", unk_token=None)
    with pytest.raises(DataError, match="row 2: the prompt must have at least one token"):
        encoded([{"prompt": "hi", "completion": "yo"}, {"prompt": " ", "completion": "yo"}], tok)
