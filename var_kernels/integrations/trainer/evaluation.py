"""Evaluation: the loss of each batch by itself, and the metrics of its rows; online, measures of fresh completions."""

import torch

from var_kernels.integrations.trainer.collator import Items, first_items
from var_kernels.integrations.trainer.metrics import StepMetrics
from var_kernels.integrations.trainer.reward_model import judge_pairs


class Evaluation:
    """Mixin in front of transformers.Trainer."""

    _evaluating = False

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """See ``transformers.Trainer.evaluate``; online: measures of fresh completions of the evaluation prompts."""
        self._evaluating = True  # the training's metrics wait for its own next log
        try:
            if self.online is None:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.online.evaluate().items()}
            self.log(metrics)
        finally:
            self._evaluating = False
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset=None):
        """See ``transformers.Trainer``; eval_dataset: None, a name, or one of those that the trainer was given."""
        return super().get_eval_dataloader(_encoded(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        """See ``transformers.Trainer``; test_dataset: as ``get_eval_dataloader``'s."""
        return super().get_test_dataloader(_encoded(test_dataset))

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


def _encoded(dataset):
    if dataset is None or isinstance(dataset, str | Items):
        return dataset
    raise TypeError(
        "eval_dataset: expected None, a name, or an evaluation set as the trainer holds it, got "
        f"{type(dataset).__name__}; rows are read, and scored by the reference, when the trainer is made: "
        "VARTrainer(..., eval_dataset={name: rows}) takes several sets"
    )
