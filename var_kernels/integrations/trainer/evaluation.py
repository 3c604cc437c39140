"""Evaluation: the loss of each batch by itself, and the metrics of its rows; online, measures of fresh completions."""

import os

import torch

from var_kernels.integrations.trainer.argument_checks import parsed_examples, read_items
from var_kernels.integrations.trainer.collator import Items, first_items, tables_of
from var_kernels.integrations.trainer.metrics import StepMetrics
from var_kernels.integrations.trainer.model_checks import check_positions
from var_kernels.integrations.trainer.reward_effect import check_rewards
from var_kernels.integrations.trainer.reward_model import judge_pairs


class Evaluation:
    """Mixin in front of transformers.Trainer."""

    _evaluating = False

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """See ``transformers.Trainer.evaluate``; eval_dataset: None, the name of a set that the trainer was given, or
        rows as it takes them, which are scored by the reference now. Online: measures of fresh completions of the
        evaluation prompts, or of these."""
        before, self._evaluating = self._evaluating, True  # the training's metrics wait for its own next log
        try:
            if self.online is None or isinstance(eval_dataset, dict):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            examples = None
            if eval_dataset is not None:
                examples = parsed_examples(eval_dataset, "eval_dataset", "prompt")
            found = self.online.evaluate(examples)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(metrics)
        finally:
            self._evaluating = before
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset=None):
        """See ``transformers.Trainer``; eval_dataset: as ``evaluate``'s."""
        return super().get_eval_dataloader(self._items_of(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        """See ``transformers.Trainer``; test_dataset: as ``evaluate``'s."""
        return super().get_test_dataloader(self._items_of(test_dataset))

    def _items_of(self, dataset):
        """An evaluation set as the trainer holds it; new rows are read and scored."""
        if dataset is None or isinstance(dataset, Items):
            return dataset
        if isinstance(dataset, str):
            if not isinstance(self.eval_dataset, dict) or dataset not in self.eval_dataset:
                names = ", ".join(self.eval_dataset) if isinstance(self.eval_dataset, dict) else "none has a name"
                raise ValueError(
                    f"eval_dataset: expected the name of a set that the trainer was given ({names}), or rows, got "
                    f"{dataset!r}; load_examples(path) reads a file"
                )
            return dataset
        if isinstance(dataset, bytes | os.PathLike) or not hasattr(dataset, "__iter__"):
            raise TypeError(
                "eval_dataset: expected None, a name, or rows in a form of docs/data.md, got "
                f"{type(dataset).__name__}; load_examples(path) reads a file"
            )
        items = read_items(dataset, "eval_dataset", *self._reading)
        rows, tables = items.rows, tables_of([self.train_dataset, self.eval_dataset])
        if self.method.columns is not None:
            rows.columns |= self.method.columns(rows, self.args, tables[0] if tables else rows)
        check_positions(self.model, rows)
        check_rewards(rows, self.args, self.method, "eval_dataset", refuse=False)
        self._score_new_rows(rows)
        return items

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """See ``transformers.Trainer``. Its metrics hold those of the rows too, so that ``metric_for_best_model`` may
        name one; the loss is the mean over items of the batches' losses."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.method.head == "reward" and self.method.loss.item != "pair":
            correct, pairs = judge_pairs(self, dataloader.dataset.rows)
            self.step_metrics["eval"].add("pair_accuracy", correct, pairs)
        output.metrics.update(self.step_metrics["eval"].take(f"{metric_key_prefix}_"))
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Counts the loss of a batch by itself. Trainer gets None: it would gather a copy of the loss for each row, and
        ranks have different numbers of these."""
        inputs = self._prepare_inputs(inputs)
        own, counted = self._own_items(inputs), self.step_metrics["eval"]
        self.step_metrics["eval"] = StepMetrics(self, "eval")
        with torch.no_grad():
            loss = self.compute_loss(model, first_items(inputs, own) if own else inputs).detach()
        made, self.step_metrics["eval"] = self.step_metrics["eval"], counted
        made.add("loss", loss * own, own)
        counted.merge(made, 1.0 if own else 0.0)  # a forward pass of sharded weights is a collective
        return None, None, None

    def _own_items(self, batch) -> int:
        """Items of this rank's batch, without those that accelerate has filled the last one up with."""
        size, state = int(batch["item"][-1]) + 1, self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return size
        return min(size, max(0, state.remainder - self.args.process_index * size))
