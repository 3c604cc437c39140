"""transformers.Trainer with fused_lm_head: plain Trainer's own curve under every option that reaches the loss."""

import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.hf_compare import assert_no_logits
from tests.ranks import run_ranks
from tests.tiny_training import tiny_model
from tests.zoo.build import build
from tests.zoo.inputs import batch
from var_kernels.integrations.hf import fused_lm_head
from var_kernels.integrations.hf_trainer import FusedLossMixin

STEPS = 20


def rows(count=40, length=12):
    """Of different numbers of labels, so that a mean of means is another loss than one mean."""
    torch.manual_seed(0)
    made = []
    for number, ids in enumerate(torch.randint(3, 200, (count, length))):
        labels = ids.clone()
        labels[: number % 11] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def trainer(folder, *, trainer_class=Trainer, trainer_options=None, model=None, data=None, **options):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return trainer_class(
        model=tiny_model(dtype=torch.float32) if model is None else model,
        args=arguments,
        train_dataset=data or rows(),
        eval_dataset=rows(6),
        **(trainer_options or {}),
    )


def curve(made):
    made.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "loss" in entry]


def doubled(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return 2 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


CASES = {
    "plain": {},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "average_tokens_across_devices off": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "padding-free": {"trainer_options": {"data_collator": DataCollatorWithFlattening()}},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},  # Trainer asks for logits then, and gets them
    "compute_loss_func": {"trainer_options": {"compute_loss_func": doubled}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_curve_of_plain_trainer(case, tmp_path):
    expected = curve(trainer(tmp_path / "plain", **CASES[case]))
    model = tiny_model(dtype=torch.float32)
    with fused_lm_head(model):
        got = curve(trainer(tmp_path / "fused", model=model, **CASES[case]))
    assert len(expected) == STEPS
    assert expected[-1][0] < expected[0][0]
    assert torch.tensor(got).tolist() == [
        pytest.approx(step, rel=3e-2 if case == "bf16" else 2e-5) for step in expected
    ]


def test_the_curve_under_torch_compile(tmp_path):
    options = {"max_steps": 4, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    expected = curve(trainer(tmp_path / "plain", max_steps=4))
    model = tiny_model(dtype=torch.float32)
    with fused_lm_head(model):
        got = curve(trainer(tmp_path / "fused", model=model, **options))
    assert got == [pytest.approx(step, rel=2e-5) for step in expected]


def pictures(model):
    """Rows of LLaVA: tokens for the patches, text, and the pixels."""
    found, size = batch(model, encoder_decoder=False), model.config.vision_config.image_size
    patches = (size // model.config.vision_config.patch_size) ** 2
    for name, value in {"input_ids": model.config.image_token_id, "labels": -100, "attention_mask": 1}.items():
        found[name] = torch.nn.functional.pad(found[name], (patches, 0), value=value)
    return found | {"pixel_values": torch.randn(3, 3, size, size)}


def targets(model):
    return batch(model, encoder_decoder=True)


OTHERS = {
    "llava": ("LlavaForConditionalGeneration", pictures),
    "kosmos-2": ("Kosmos2ForConditionalGeneration", lambda model: batch(model, encoder_decoder=False)),
    "t5": ("T5ForConditionalGeneration", targets),  # whose own loss does not read num_items_in_batch
    "vision-encoder-decoder": ("VisionEncoderDecoderModel", targets),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_pictures_and_decoder_labels(kind, tmp_path):
    name, inputs = OTHERS[kind]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 1e-3, "remove_unused_columns": False}
    curves = []
    for fused in (False, True):
        model = build(kind, name, decoder_only=False).float()
        torch.manual_seed(0)
        found = inputs(model)
        data = [{key: value[i] for key, value in found.items()} for i in (0, 1, 2, 0, 2, 1, 1, 0, 2, 1, 0, 2)]
        head = fused_lm_head(model)
        if fused:
            head.apply()
        curves.append(curve(trainer(tmp_path / str(fused), model=model, data=data, **options)))
        head.restore()
    assert len(curves[0]) == 3
    assert curves[1] == [pytest.approx(step, rel=1e-4) for step in curves[0]]


class FusedTrainer(FusedLossMixin, Trainer):
    pass


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_has_logits_where_it_wants_them_and_training_none(bf16, tmp_path):
    """With bf16 accelerate puts a forward of its own above ours before the first evaluation."""
    shapes = {}

    def metrics(prediction):
        shapes["metrics"] = prediction.predictions.shape
        return {"first": float(prediction.predictions[0, 0, 0])}

    results = []
    for trainer_class in (Trainer, FusedTrainer):
        options = {"trainer_class": trainer_class, "trainer_options": {"compute_metrics": metrics}, "bf16": bf16}
        made = trainer(tmp_path / trainer_class.__name__, max_steps=4, eval_strategy="steps", eval_steps=2, **options)
        losses = [loss for loss, _ in curve(made)]
        predictions = made.predict(rows(4)).predictions
        found = made.evaluate(metric_key_prefix="last")
        results.append([*losses, found["last_loss"], found["last_first"], *predictions[0, 0, :9].tolist()])
    assert shapes["metrics"] == (6, 12, made.model.config.vocab_size)
    assert results[1] == pytest.approx(results[0], rel=5e-2 if bf16 else 1e-4, abs=2e-2 if bf16 else 1e-5)
    batch = made.data_collator(rows(2))
    assert_no_logits(made.model(**batch).logits)  # fused again


def test_every_model_of_model_init_is_fused(tmp_path):
    """Trainer's constructor makes a model, and train() another one."""
    models = []

    def model_init():
        models.append(tiny_model(dtype=torch.float32))
        return models[-1]

    arguments = trainer(tmp_path, max_steps=2).args
    data = {"train_dataset": rows(), "eval_dataset": rows(6)}
    expected = curve(Trainer(model_init=model_init, args=arguments, **data))
    made = FusedTrainer(model_init=model_init, args=arguments, **data)
    assert curve(made) == [pytest.approx(step, rel=1e-4) for step in expected]
    assert made.model is models[3]
    assert_no_logits(made.model(**made.data_collator(rows(2))).logits)
    assert made.predict(rows(4)).predictions.shape == (4, 12, made.model.config.vocab_size)


def test_a_mixin_behind_its_trainer_is_refused():
    with pytest.raises(TypeError, match=r"stands behind Trainer, .* write class Late\(FusedLossMixin, Trainer\)"):

        class Late(Trainer, FusedLossMixin):
            pass

    class Step:
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    class Early(Step, FusedLossMixin, Trainer):
        pass

    class Further(Early):
        def train(self, *args, **kwargs):
            return super().train(*args, **kwargs)


def test_evaluation_of_the_loss_makes_no_logits(tmp_path):
    expected = trainer(tmp_path / "plain").evaluate()["eval_loss"]
    made = trainer(tmp_path / "fused", trainer_class=FusedTrainer)
    seen = []
    made.model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    made.evaluate()  # the head is looked at once, on a few rows
    seen.clear()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert set(seen) == {1}


# ---- no label left ---------------------------------------------------------------------------------------------------


def unlabelled(data, which):
    ignored = {"labels": torch.full_like(data[0]["labels"], -100)}
    return [{**row, **ignored} if i in which else row for i, row in enumerate(data)]


STEPS_WITHOUT_LABELS = {
    "every step": (range(40), {}),
    "a micro batch of an accumulated step": (
        range(0, 40, 4),
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "average_tokens_across_devices": False},
    ),
    "counts not averaged": (
        range(0, 40, 2),
        {"average_tokens_across_devices": False, "per_device_train_batch_size": 1},
    ),
    "label smoothing": (range(40), {"label_smoothing_factor": 0.1}),
}


@pytest.mark.parametrize("case", STEPS_WITHOUT_LABELS)
def test_a_step_without_labels_is_plain_trainers(case, tmp_path):
    which, options = STEPS_WITHOUT_LABELS[case]
    curves, weights = [], []
    for trainer_class in (Trainer, FusedTrainer):
        made = trainer(
            tmp_path / trainer_class.__name__,
            trainer_class=trainer_class,
            data=unlabelled(rows(), which),
            max_steps=4,
            **options,
        )
        curves.append(curve(made))
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    assert curves[1] == [pytest.approx(step, rel=2e-5, nan_ok=True) for step in curves[0]]
    assert weights[1].isfinite().all()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [(), (0, 1), (0,), range(6)], ids=["none", "a batch", "a row", "all"])
def test_evaluation_batches_without_labels_are_left_out_of_the_mean(which, tmp_path):
    losses = []
    for trainer_class in (Trainer, FusedTrainer):
        made = trainer(tmp_path / trainer_class.__name__, trainer_class=trainer_class, per_device_eval_batch_size=2)
        losses.append(made.evaluate(unlabelled(rows(6), which))["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, nan_ok=True)
    assert math.isnan(losses[1]) or len(which) < 6


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor(0.0), None], ids=str)
@pytest.mark.parametrize("kind", ["no label", "one token"])
def test_no_label_left_is_a_differentiable_zero(kind, num_items):
    model, data = tiny_model(dtype=torch.float32), rows(2)
    ids = torch.stack([row["input_ids"] for row in data])
    ids = ids if kind == "no label" else ids[:, :1]
    labels = torch.full_like(ids, -100) if kind == "no label" else ids
    with fused_lm_head(model):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_count_of_zero_beside_labels_is_not_hidden():
    model, data = tiny_model(dtype=torch.float32), rows(2)
    ids = torch.stack([row["input_ids"] for row in data])
    with fused_lm_head(model), pytest.raises(ValueError, match="num_items must be positive"):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(0))


def _loop_with_a_rank_without_labels(rank, world, folder):
    model = torch.nn.parallel.DistributedDataParallel(tiny_model(dtype=torch.float32))
    data = unlabelled(rows(4), (2, 3))[2 * rank : 2 * rank + 2]
    inputs = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "labels")}
    count = inputs["labels"][:, 1:].ne(-100).sum()  # of this rank alone
    with fused_lm_head(model):
        loss = model(**inputs, num_items_in_batch=count).loss
    loss.backward()
    torch.save((loss.detach(), model.module.lm_head.weight.grad), folder / f"rank-{rank}.pt")


def test_one_rank_without_labels(tmp_path):
    run_ranks(_loop_with_a_rank_without_labels, 2, tmp_path)
    (loss, grad), (empty, same) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    model, data = tiny_model(dtype=torch.float32), rows(2)
    inputs = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "labels")}
    own = model(**inputs).loss
    own.backward()
    assert loss.item() == pytest.approx(own.item(), rel=2**-17)
    assert empty.item() == 0.0
    assert grad.equal(same)
    torch.testing.assert_close(grad, model.lm_head.weight.grad / 2, rtol=1e-5, atol=1e-8)


# ---- logits that are not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["compute_metrics", "preprocess_logits_for_metrics", "predict", "batch_eval_metrics"])
def test_evaluation_under_a_bare_block_says_where_the_logits_are(use, tmp_path):
    """At its first step, not as a missing attribute at its end."""
    model = tiny_model(dtype=torch.float32)
    given = {"compute_metrics": lambda prediction, compute_result=True: {"n": prediction.predictions.argmax(-1).sum()}}
    if use == "preprocess_logits_for_metrics":
        given[use] = lambda logits, labels: logits.argmax(-1)
    options = {"batch_eval_metrics": use == "batch_eval_metrics"}
    with fused_lm_head(model):
        made = trainer(tmp_path, model=model, trainer_options=given, **options)
        with pytest.raises(
            ValueError, match=r"logits: .* leave the labels out .*FusedLossMixin.*the model's own logits"
        ):
            (made.predict if use == "predict" else made.evaluate)(rows(4))
    assert "eval_n" in trainer(tmp_path, model=model, trainer_options=given, **options).evaluate(rows(4))


def test_a_compute_loss_of_ones_own_says_where_the_logits_are(tmp_path):
    class Own(FusedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(
                outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            )
            return (loss, outputs) if return_outputs else loss

    with pytest.raises(ValueError, match=r"logits: .* leave the labels out"):
        trainer(tmp_path, trainer_class=Own, max_steps=1).train()
