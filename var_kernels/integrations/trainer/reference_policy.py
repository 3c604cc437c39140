"""The reference of a trainer: a model of its own, the model without its adapter, or the model before training; and what
it is asked."""

import contextlib
import copy
import hashlib
from collections.abc import Iterator

from torch import Tensor, nn

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.hf.distill import HeadInputs, head_inputs
from var_kernels.integrations.trainer.reference import (
    cache_path,
    cached_ref_logp,
    model_fingerprint,
    rows_fingerprint,
    rows_of_run,
    score_batch,
)
from var_kernels.integrations.trainer.sharding import place_reference, without_adapter
from var_kernels.integrations.trainer.values import fit_value_head, new_head, prompt_states, values_of


class ReferencePolicy:
    """Mixin in front of transformers.Trainer."""

    def _prepare_reference(self, tables: list[EncodedRows]) -> None:
        initial = self.online.reads_initial_model if self.args.online else self.method.reference
        if not (self.method.teacher or initial):
            self.ref_model = None
            return
        self._own_reference = self.ref_model is None
        precompute = self.args.precompute_ref_log_probs and not (self.args.online or self.method.teacher)
        if self.ref_model is None and not precompute and not _is_peft(self.model):
            self.ref_model = copy.deepcopy(self.model)
        if self.ref_model is not None:
            self.ref_model = place_reference(self, self.ref_model)
            if not precompute:
                self.ref_model.requires_grad_(False).eval()
        if precompute and not self._unscored:
            self._score_reference(self.model if self.ref_model is None else self.ref_model, tables)

    def _score_reference(self, model: nn.Module, tables: list[EncodedRows]) -> None:
        for rows in tables:
            of_run = rows_of_run(self) if self.train_dataset is not None and rows is self.train_dataset.rows else None
            with self._as_reference(model):
                logp = cached_ref_logp(self, model, rows, self._cache_key(rows), of_run)
            if self.method.reference == "token":
                rows.token_columns["ref_token_logp"] = logp
            rows.columns["ref_logp"] = rows.row_sums(logp)
        self.ref_model = None  # its memory is not needed any more

    def _cache_key(self, rows: EncodedRows) -> str:
        content = f"{self._ref_key} {rows_fingerprint(rows)} {self.accelerator.mixed_precision}"
        if self.args.logp_temperature != 1:
            content += f" temperature {self.args.logp_temperature}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _score_new_rows(self, rows: EncodedRows) -> None:
        """The reference's columns of rows that come once the trainer is made, by what there still is of it: a live
        model, the model without its adapter, a policy that has not moved yet, or scores in the cache.

        Raises:
            ValueError: there is none of these.
        """
        if not self.method.reference:
            return
        live, model = not self.args.precompute_ref_log_probs, self._reference_at_hand()
        needed = self.method.head == "fitted" or not (live or cache_path(self.args, self._cache_key(rows)).exists())
        if model is None and needed:
            raise ValueError(
                "eval_dataset: new rows need the reference, which scored the data before training and was let go; pass "
                "precompute_ref_log_probs=False, which keeps it, or give these rows to the trainer when it is made: "
                "VARTrainer(..., eval_dataset={name: rows}) takes several sets"
            )
        if self.method.head == "fitted":
            with self._as_reference(model):
                rows.columns["value"] = values_of(self.extra_head, prompt_states(self, model, rows))
        if not live:  # else batch by batch
            self._score_reference(model or self.model, [rows])

    def _reference_at_hand(self) -> nn.Module | None:
        if self.ref_model is not None:
            return self.ref_model
        if not self._own_reference or _is_peft(self.model):
            return self.model if self._own_reference else None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return self.model if model_fingerprint(self.model) == self._ref_key else None

    def create_scheduler(self, *args, **kwargs):
        """Trainer comes by here when accelerate has spread the weights and before it loads a checkpoint into them: the
        moment for a model that is its own reference to score the data."""
        prepared = self.accelerator._models
        if self._unscored and prepared:
            tables, self._unscored = self._unscored, []
            if self.method.reference and self.args.precompute_ref_log_probs:
                self._score_reference(prepared[-1], tables)
            if self.method.head == "fitted":
                self._fit_values(prepared[-1], tables)
        return super().create_scheduler(*args, **kwargs)

    def _fit_values(self, model: nn.Module, tables: list[EncodedRows]) -> None:
        """V(x) of A-LoL: fitted on the rewards of the training set, by the reference, which is the model so far."""
        train = tables[0]
        squashed = train.reward.sigmoid() if getattr(self.args, "squash", True) else train.reward
        with self._as_reference(model):
            states = [prompt_states(self, model, rows) for rows in tables]
        self.extra_head = new_head(model, "value")
        fit_value_head(self.extra_head, states[0], train, squashed)
        for rows, states_of_rows in zip(tables, states, strict=True):
            rows.columns["value"] = values_of(self.extra_head, states_of_rows)

    def _as_reference(self, model: nn.Module) -> contextlib.AbstractContextManager:
        own = self.ref_model is None and _is_peft(model)
        return without_adapter(model) if own else contextlib.nullcontext()

    @contextlib.contextmanager
    def _live_reference(self) -> Iterator[nn.Module]:
        """The reference's model in eval mode; the policy's own without its adapter."""
        model = self.model if self.ref_model is None else self.ref_model
        was_training = model.training
        model.eval()
        with self._as_reference(model):
            yield model
        model.train(was_training)

    def _attach_reference(self, batch: dict[str, Tensor]) -> None:
        with self._live_reference() as model:
            logp = score_batch(self, model, batch)
        if self.method.reference == "token":
            batch["ref_token_logp"] = logp
        batch["ref_logp"] = logp.sum(-1)

    def _teacher_inputs(self, batch: dict[str, Tensor]) -> HeadInputs | None:
        """What the teacher feeds its lm_head, where the method has one."""
        if not self.method.teacher:
            return None
        with self._live_reference() as model:
            return head_inputs(model, batch)


def _is_peft(model: nn.Module) -> bool:
    return callable(getattr(model, "disable_adapter", None))
