"""Distillation from a teacher model: the divergence inside two heads, the trainer's methods, TRL's GKD loss."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import divergences
from tests.products import Products
from tests.tiny_online import online_trainer
from tests.tiny_training import ROWS, tiny_model, tiny_trainer, tokenizer
from var_kernels import linear_token_kl
from var_kernels.integrations.hf import distillation_loss, token_divergence

FP64 = torch.float64


def batch():
    torch.manual_seed(3)
    ids = torch.randint(3, len(tokenizer()), (3, 9))
    labels = ids.clone()
    labels[:, :3] = labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model, given):
    return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]


def expected(student, teacher, given, direction, beta=0.5, temperature=1.0):
    logp = (logits(student, given) / temperature).log_softmax(-1)
    logq = (logits(teacher, given).detach() / temperature).log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if direction == "jsd":
        logm = (beta * logq.exp() + (1 - beta) * logp.exp()).log()
        value = beta * kl(logq, logm) + (1 - beta) * kl(logp, logm)
    else:
        value = kl(logp, logq) if direction == "reverse" else kl(logq, logp)
    return value.where(given["labels"][:, 1:] != -100, 0.0)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_divergence_of_two_models(direction):
    student, teacher, given = tiny_model(0), tiny_model(1), batch()
    options = {"direction": direction, "beta": 0.3, "temperature": 1.7}
    got = token_divergence(student, teacher, given, **options)
    want = expected(student, teacher, given, **options)
    torch.testing.assert_close(got[:, 1:], want)
    assert not got[:, 0].any()
    got.sum().backward()
    gradient = student.lm_head.weight.grad.clone()
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    expected(student, teacher, given, **options).sum().backward()
    torch.testing.assert_close(gradient, student.lm_head.weight.grad)
    loss = distillation_loss(student, teacher, given, **options)
    active = (given["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss, want.sum() / active)
    student.zero_grad()
    loss.backward()
    torch.testing.assert_close(student.lm_head.weight.grad, gradient / active)


def test_a_teacher_padded_further():
    """Ids that the student does not have are cut off by name, and refused without it."""
    student, teacher, given = tiny_model(0), tiny_model(1), batch()
    ids = len(tokenizer())
    whole = token_divergence(student, teacher, given)
    teacher.resize_token_embeddings(ids + 5)
    with pytest.raises(ValueError, match=r"one vocabulary.*vocabulary=len\(tokenizer\)"):
        token_divergence(student, teacher, given)
    torch.testing.assert_close(token_divergence(student, teacher, given, vocabulary=ids), whole)


BETAS = [("forward", 0.0), ("jsd", 0.3), ("reverse", 1.0)]  # TRL's and Liger's names of the three


@pytest.mark.parametrize(("direction", "beta"), BETAS)
def test_against_trl(direction, beta):
    trl = pytest.importorskip("trl.experimental.gkd", reason="TRL's GKD trainer is not installed")
    student, teacher, given = tiny_model(0), tiny_model(1), batch()
    both = logits(student, given), logits(teacher, given)
    theirs = trl.GKDTrainer.generalized_jsd_loss(*both, given["labels"][:, 1:], beta=beta, temperature=2.0)
    mixed = {"beta": beta} if direction == "jsd" else {}
    torch.testing.assert_close(
        distillation_loss(student, teacher, given, direction=direction, temperature=2.0, **mixed), theirs
    )


@pytest.mark.parametrize(("direction", "beta"), BETAS)
def test_against_liger(direction, beta):
    """The loss that Liger makes of chunks of both models' logits; its beta is the teacher's share too."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    torch.manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(s) for s in ((21, 8), (50, 8), (21, 12), (50, 12)))
    labels = torch.randint(0, 50, (21,))
    labels[3:7] = -100
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False
    )(hidden, weight, ref_hidden, ref_weight, labels)
    mixed = {"beta": beta} if direction == "jsd" else {}
    temperatures = {"temperature": 2.0, "ref_temperature": 2.0}
    ours = linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, direction=direction, **temperatures, **mixed)
    torch.testing.assert_close(ours.sum() / 17, theirs if theirs.dim() == 0 else theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", divergences.SIDES)
def test_sides_of_the_comparison_give_the_same_numbers(name):
    """Each to fp32's digits; in bf16 those that round logits to it are further from fp64 than ours."""
    why = divergences.obstacle(name, on_cpu=True)
    if why:
        pytest.skip(why)
    if divergences.SIDES[name].triton:
        from tests import triton_interpreter

        triton_interpreter.mend()
    assert max(divergences.errors(name, divergences.two_heads(21, 16, 97, torch.float32)).values()) < 1e-5
    coarse = divergences.errors(name, divergences.two_heads(21, 16, 97, torch.bfloat16))
    assert coarse["value_error"] < (1e-6 if name.startswith("ours") else 0.1)
    assert max(coarse["dhidden_error"], coarse["dweight_error"]) < (2**-8 if name.startswith("ours") else 0.3)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_step_is_that_of_the_formula(direction, tmp_path):
    """One step of plain SGD over the whole data set, against autograd through both models' logits."""
    student, teacher = tiny_model(0), tiny_model(1)
    twin = tiny_model(0)
    trainer = tiny_trainer(
        tmp_path, ROWS, model=student, method="distill", direction=direction, sft_on="all",
        per_device_train_batch_size=24, trainer_options={"ref_model": teacher},
    )  # fmt: skip
    data = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    trainer.train()
    given = {name: data[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = expected(twin, teacher, given, direction).sum() / (given["labels"][:, 1:] != -100).sum()
    loss.backward()
    rate = trainer.args.learning_rate
    for moved, start in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved.detach(), start.detach() - rate * start.grad)


def test_four_gemms_where_the_budget_holds_no_gradient_of_all_logits(tmp_path, small_tiles):
    """The trainer's loss and ``distillation_loss`` are sums with known weights: logits are computed once."""
    student, teacher = tiny_model(0), tiny_model(1)
    trainer = tiny_trainer(
        tmp_path, ROWS, model=student, method="distill", sft_on="all", per_device_train_batch_size=24,
        workspace_mb=0.15, trainer_options={"ref_model": teacher},
    )  # fmt: skip
    data = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    given = {name: data[name] for name in ("input_ids", "attention_mask", "labels")}
    rows = int((given["labels"][:, 1:] != -100).sum())
    entries = rows * len(tokenizer()) * 2
    assert entries * 8 > 0.15 * 2**20  # fp64 logits

    def logits(step) -> int:
        """Of the products over the hidden size, those that are no layer's: these are of all positions."""
        with Products() as products:
            step()
        depth, positions = student.config.hidden_size, given["labels"].numel()
        return sum(m * n for m, n, k in products.sizes if k == depth and m != positions)

    assert logits(distillation_loss(student, teacher, given, workspace_mb=0.15).backward) == 0
    assert logits(lambda: distillation_loss(student, teacher, given, workspace_mb=0.15).backward()) == entries
    a_value_each = token_divergence(student, teacher, given, workspace_mb=0.15)
    assert logits(a_value_each.sum().backward) == entries
    assert logits(trainer.train) == entries


def test_the_run_on_a_real_model_with_a_tiny_one(tmp_path, monkeypatch):
    """``benchmarks.real distill``: the student keeps the first and the last layer."""
    from benchmarks.real import distill

    tokenizer().save_pretrained(tmp_path)
    words = type(tokenizer()).from_pretrained(tmp_path)
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    teacher = tiny_model(1, torch.float32, num_hidden_layers=3)
    monkeypatch.setattr(distill, "load", lambda *_: (teacher, words))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({name: row[name] for name in ("prompt", "completions")}) for row in ROWS))
    sizes = distill.Sizes(layers=2, steps=8, batch=2, tokens=32, held_out=2, rate=1e-2)
    rows = list(distill.runs(file, 0, sizes))
    assert [row["method"] for row in rows] == ["distill", "sft"]
    assert all(row.keys() == set(distill.COLUMNS) for row in rows)
    assert rows[0]["fall"] == pytest.approx(rows[0]["kl_before"] - rows[0]["kl"])
    kept = [layer.mlp.up_proj.weight for layer in distill.cut(teacher, 2).model.layers]
    assert torch.equal(kept[0], teacher.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(kept[1], teacher.model.layers[2].mlp.up_proj.weight)
    assert kept[0].requires_grad


def losses_of(trainer):
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def asft(model, reference_logits, given, kl_coef):
    """Mean over the labels of DFT and kl_coef KL(reference || model), by autograd through both models' logits."""
    labels, logp, logq = given["labels"][:, 1:], logits(model, given).log_softmax(-1), reference_logits.log_softmax(-1)
    kept, label_logp = labels != -100, logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    kl = (logq.exp() * (logq - logp)).sum(-1)
    return (kl_coef * kl - label_logp.detach().exp() * label_logp)[kept].mean()


def whole_batch(trainer):
    data = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return {name: data[name] for name in ("input_ids", "attention_mask", "labels")}


ASFT = {
    "method": "asft",
    "kl_coef": 0.7,
    "sft_on": "all",
    "per_device_train_batch_size": 24,
    "per_device_eval_batch_size": 24,
}


@pytest.mark.parametrize("given", [True, False], ids=["ref_model", "the model before training"])
def test_steps_of_asft_are_those_of_the_formula(given, tmp_path):
    """Three steps of plain SGD: from the second on the policy has left its reference."""
    model, twin, reference = tiny_model(0), tiny_model(0), tiny_model(1 if given else 0)
    options = {"ref_model": tiny_model(1)} if given else {}
    trainer = tiny_trainer(tmp_path, ROWS, model=model, max_steps=3, learning_rate=1.0, trainer_options=options, **ASFT)
    batch, want = whole_batch(trainer), []
    for _ in range(3):
        loss = asft(twin, logits(reference, batch).detach(), batch, 0.7)
        want.append(loss.item())
        for parameter, slope in zip(twin.parameters(), torch.autograd.grad(loss, twin.parameters()), strict=True):
            parameter.data -= slope
    assert losses_of(trainer) == pytest.approx(want, rel=1e-5)
    for moved, expected_weight in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved.detach(), expected_weight.detach())
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(
        asft(twin, logits(reference, batch), batch, 0.7).item(), rel=1e-5
    )


def test_asft_of_an_adapter_is_held_near_the_model_without_it(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_trainer(tmp_path, ROWS, model=tiny_model(0), trainer_options={"peft_config": lora}, **ASFT)
    assert trainer.ref_model is None
    batch = whole_batch(trainer)
    want = asft(trainer.model, logits(tiny_model(0), batch), batch, 0.7)
    assert losses_of(trainer) == pytest.approx([want.item()], rel=1e-5)


def test_asft_refusals(tmp_path):
    with pytest.raises(ValueError, match="kl_coef must be finite and >= 0, got -1"):
        tiny_trainer(tmp_path, ROWS, method="asft", kl_coef=-1.0)
    with pytest.raises(ValueError, match=r"online must be False for method 'asft', .* it learns from demonstrations"):
        online_trainer(tmp_path, method="asft")


def test_training_lowers_the_divergence(tmp_path):
    options = {"max_steps": 8, "learning_rate": 1e-2, "optim": "adamw_torch", "per_device_train_batch_size": 8}
    more = {"model": tiny_model(0), "trainer_options": {"ref_model": tiny_model(1)}}
    losses = losses_of(tiny_trainer(tmp_path, ROWS, method="distill", **more, **options))
    assert losses[-1] < 0.5 * losses[0]


def test_on_policy(tmp_path):
    """The student's own completions, no reward: its reverse KL to the teacher falls."""
    student, teacher = tiny_model(0), tiny_model(1)
    trainer = online_trainer(
        tmp_path, method="distill", direction="reverse", model=student, reward_func=None,
        trainer_options={"ref_model": teacher}, iterations=4,
    )  # fmt: skip
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"ref_model: method 'distill' needs a teacher, got none.*--teacher"):
        tiny_trainer(tmp_path, ROWS, model=tiny_model(), method="distill", trainer_options={"ref_model": None})
    with pytest.raises(ValueError, match="sync_ref_model must be False"):
        tiny_trainer(
            tmp_path, ROWS, model=tiny_model(), method="distill", sync_ref_model=True,
            precompute_ref_log_probs=False, trainer_options={"ref_model": tiny_model(1)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="direction"):
        tiny_trainer(
            tmp_path, ROWS, model=tiny_model(), method="distill", direction="sideways",
            trainer_options={"ref_model": tiny_model(1)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="batch must hold labels"):
        token_divergence(tiny_model(), tiny_model(1), {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
