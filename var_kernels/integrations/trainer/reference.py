"""The reference policy, and its log-probs of every token: computed once, kept on disk under the content that they
depend on.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.files import atomic_write, cache_folder
from var_kernels.integrations.hf.distill import HeadInputs, head_inputs
from var_kernels.integrations.hf.forwards import evaluating
from var_kernels.integrations.trainer.scoring import score_batch, score_rows
from var_kernels.integrations.trainer.sharding import place_reference, whole_tensors, without_adapter
from var_kernels.integrations.trainer.value_head import fit_value_head, new_head, prompt_states, values_of

logger = logging.getLogger(__name__)
_SMALL_PART = 8  # below this share of the data only the rows that a run reads are scored


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every weight and of the configuration: equal for equal models, wherever they were loaded from. Under
    ZeRO-3 a collective."""
    left_out = ("_name_or_path", "transformers_version", "use_cache")
    config = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    return hash_tensors(whole_tensors(model), json.dumps(config, sort_keys=True, default=str).encode())


def hash_tensors(named: Iterable[tuple[str, Tensor]], start: bytes = b"") -> str:
    """Hash of names, dtypes, shapes and values, after ``start``."""
    digest = hashlib.sha256(start)
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_path(args, key: str) -> Path:
    return Path(args.cache_dir or cache_folder()).expanduser() / "ref_logp" / f"{key}.safetensors"


def cached_ref_logp(
    trainer, model: nn.Module, rows: EncodedRows, key: str, wanted: Sequence[int] | None = None
) -> Tensor:
    """(tokens,) fp32, nats, 0 in the prompts: from the cache, or scored now (each rank its share) and kept.

    wanted: the rows that will be read, None for all. Where they are scored now the others are NaN, and nothing is kept.

    Raises:
        DataError: rows whose log-prob is not finite.
    """
    path = cache_path(trainer.args, key)
    found = _load(path, len(rows.token_ids))
    # Every rank must have it, or all score: a rank that skips its share would leave the others waiting.
    missing = trainer.accelerator.reduce(torch.tensor(int(found is None), device=trainer.accelerator.device), "sum")
    if not missing:
        logger.info("reference log-probs of %d rows read from %s", len(rows), path)
        return found
    if trainer.args.should_save and wanted is None:
        logger.info(
            "scoring %d rows (%d tokens) with the reference, once: kept in %s for this run's resumes and for others",
            len(rows), len(rows.token_ids), path.parent,
        )  # fmt: skip
    elif trainer.args.should_save:
        logger.info(
            "scoring %d of %d rows (%d tokens) with the reference: those that the run's steps read",
            len(wanted), len(rows), sum(rows.length(row) for row in wanted),
        )  # fmt: skip
    remedy = "-inf: its head forbids a label of the row, drop it; nan: it overflows, load it in a wider dtype"
    logp = score_rows(trainer, model, rows, "reference model", remedy, wanted)
    if trainer.args.should_save and wanted is None:
        try:
            with atomic_write(path) as temporary:
                save_file({"ref_token_logp": logp}, temporary)
        except (OSError, SafetensorError) as error:  # a home that is read-only: the scores are right all the same
            logger.warning(
                "reference log-probs are not kept, a further run scores the data again: %s (%s); cache_dir "
                "(--cache-dir), or $VAR_KERNELS_CACHE, names another place", path.parent, error,
            )  # fmt: skip
    return logp


def rows_of_run(trainer) -> list[int] | None:
    """The training rows that ``max_steps`` steps read, in the order of the run's own sampler; None where those are no
    small part of them (then all are scored, and kept for further runs), or where ranks share them."""
    args, items = trainer.args, trainer.train_dataset
    batches = args.max_steps * args.gradient_accumulation_steps
    if items is None or args.max_steps <= 0 or args.world_size > 1:
        return None
    if _SMALL_PART * batches * args.train_batch_size >= len(items):
        return None
    loader = trainer.get_train_dataloader()
    with contextlib.suppress(ValueError):
        trainer.accelerator._dataloaders.remove(loader)  # the run makes its own
    read = itertools.islice(loader.batch_sampler, batches)
    return sorted({row for batch in read for index in batch for row in items.items[index]})


def _load(path: Path, num_tokens: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        logp = load_file(path)["ref_token_logp"]
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s cannot be read (%s): computed anew", path, error)
        return None
    return logp if logp.shape == (num_tokens,) and logp.isfinite().all() else None


class ReferencePolicy:
    """The reference of a run: a model of its own, the policy without its adapter, or the policy before training.

    Args:
        trainer: the ``VARTrainer``, whose model, method, settings and accelerator are read.
        model: the model that was given, if any.
        fingerprint: of the weights that score the data, part of the cache's keys; "" where nothing is scored.
    """

    def __init__(self, trainer, model: nn.Module | None, fingerprint: str):
        self.trainer, self.model, self._fingerprint = trainer, model, fingerprint
        self._was_given = model is not None
        self._waiting: list[EncodedRows] = []  # tables that the policy scores once its weights are sharded

    def prepare(self, tables: list[EncodedRows]) -> None:
        """Place the reference and score the data with it, or keep it where batches are scored as they come."""
        trainer, args, method = self.trainer, self.trainer.args, self.trainer.method
        if not self._was_given and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            self._waiting = tables
        if method.head == "fitted" and not self._waiting:  # before the reference is let go
            self._fit_values(self.model.to(trainer.accelerator.device) if self._was_given else trainer.model, tables)
        initial = trainer.online.reads_initial_model if args.online else method.reference
        if not (method.teacher or initial):
            self.model = None
            return
        precompute = args.precompute_ref_log_probs and not (args.online or method.teacher)
        if self.model is None and not precompute and not _is_peft(trainer.model):
            self.model = copy.deepcopy(trainer.model)
        if self.model is not None:
            self.model = place_reference(trainer, self.model)
            if not precompute:
                self.model.requires_grad_(False).eval()
        if precompute and not self._waiting:
            self._score(trainer.model if self.model is None else self.model, tables)

    def score_waiting(self, prepared: Sequence[nn.Module]) -> None:
        """Score the data by the policy that accelerate has ``prepared``, before a checkpoint is loaded into it."""
        if not (self._waiting and prepared):
            return
        tables, self._waiting = self._waiting, []
        if self.trainer.method.reference and self.trainer.args.precompute_ref_log_probs:
            self._score(prepared[-1], tables)
        if self.trainer.method.head == "fitted":
            self._fit_values(prepared[-1], tables)

    def score_new_rows(self, rows: EncodedRows) -> None:
        """Score rows that come once the trainer is made, by what there still is of the reference: a live model, the
        policy without its adapter, a policy that has not moved yet, or scores in the cache.

        Raises:
            ValueError: there is none of these.
        """
        trainer, method = self.trainer, self.trainer.method
        if not method.reference:
            return
        live, model = not trainer.args.precompute_ref_log_probs, self._at_hand()
        cached = not live and cache_path(trainer.args, self._cache_key(rows)).exists()
        if model is None and (method.head == "fitted" or not (live or cached)):
            raise ValueError(
                "eval_dataset must be a set that the trainer was made with, since the reference scored the data before "
                "training and is no longer in memory, got new rows; pass precompute_ref_log_probs=False, which keeps "
                "it, or VARTrainer(..., eval_dataset={name: rows}), which can be several sets"
            )
        if method.head == "fitted":
            with self.applied(model):
                rows.columns["value"] = values_of(trainer.extra_head, prompt_states(trainer, model, rows))
        if not live:  # else batch by batch
            self._score(model or trainer.model, [rows])

    def score_step(self, batch: dict[str, Tensor]) -> None:
        """Add a batch's log-probs under the reference as it is."""
        with self._live() as model:
            logp = score_batch(self.trainer, model, batch)
        if self.trainer.method.reference == "token":
            batch["ref_token_logp"] = logp
        batch["ref_logp"] = logp.sum(-1)

    def teacher_inputs(self, batch: dict[str, Tensor]) -> HeadInputs:
        """The lm_head of the method's teacher and what is fed to it."""
        with self._live() as model:
            return head_inputs(model, batch)

    def applied(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """A block in which ``model`` is the reference: the policy's own without its adapter, where it has one."""
        own = self.model is None and _is_peft(model)
        return without_adapter(model) if own else contextlib.nullcontext()

    @contextlib.contextmanager
    def _live(self) -> Iterator[nn.Module]:
        model = self.trainer.model if self.model is None else self.model
        with evaluating(model), self.applied(model):
            yield model

    def _at_hand(self) -> nn.Module | None:
        policy = self.trainer.model
        if self.model is not None or self._was_given:
            return self.model
        if _is_peft(policy):
            return policy
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            return None
        return policy if model_fingerprint(policy) == self._fingerprint else None

    def _score(self, model: nn.Module, tables: list[EncodedRows]) -> None:
        train = self.trainer.train_dataset
        for rows in tables:
            of_run = rows_of_run(self.trainer) if train is not None and rows is train.rows else None
            with self.applied(model):
                logp = cached_ref_logp(self.trainer, model, rows, self._cache_key(rows), of_run)
            if self.trainer.method.reference == "token":
                rows.token_columns["ref_token_logp"] = logp
            rows.columns["ref_logp"] = rows.row_sums(logp)
        self.model = None  # its memory is not needed any more

    def _cache_key(self, rows: EncodedRows) -> str:
        content = f"{self._fingerprint} {rows.fingerprint()} {self.trainer.accelerator.mixed_precision}"
        if self.trainer.args.logp_temperature != 1:
            content += f" temperature {self.trainer.args.logp_temperature}"
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _fit_values(self, model: nn.Module, tables: list[EncodedRows]) -> None:
        """V(x) of A-LoL, fitted on the rewards of the training set, the first of the tables."""
        trainer, train = self.trainer, tables[0]
        squashed = train.reward.sigmoid() if getattr(trainer.args, "squash", True) else train.reward
        with self.applied(model):
            states = [prompt_states(trainer, model, rows) for rows in tables]
        trainer.extra_head = new_head(model, "value")
        fit_value_head(trainer.extra_head, states[0], train, squashed)
        for rows, states_of_rows in zip(tables, states, strict=True):
            rows.columns["value"] = values_of(trainer.extra_head, states_of_rows)


class SyncReference(TrainerCallback):
    """reference = alpha * policy + (1 - alpha) * reference, every so many steps, weight by weight of the same name.

    Raises:
        ValueError: a reference whose weights are not the policy's, by name and shape, or are tied where those are not.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._pairs(trainer.model)

    def _pairs(self, policy) -> list[tuple[Tensor, Tensor]]:
        """Each weight of the reference once, with the policy's; a tied one has two names."""
        ours, theirs = (
            dict(model.named_parameters(remove_duplicate=False)) for model in (policy, self.trainer.ref_model)
        )
        for name in sorted({*ours, *theirs}):
            shapes = [tuple(weights[name].shape) if name in weights else None for weights in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"sync_ref_model: the reference must have the policy's weights, got {name} of shape {shapes[0]} in "
                    f"the policy and {shapes[1]} in ref_model; pass a ref_model of the same architecture, or drop one"
                )
        pairs = {}
        for name, weight in theirs.items():
            if pairs.setdefault(id(weight), (weight, ours[name]))[1] is not ours[name]:
                raise ValueError(
                    f"sync_ref_model: ref_model must be tied as the policy is, got {name} tied to another weight in "
                    "ref_model alone; pass a ref_model that is tied alike, or drop one"
                )
        return list(pairs.values())

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for ref_param, param in self._pairs(policy):
            ref_param.lerp_(param.detach().to(ref_param.dtype), args.ref_model_mixup_alpha)


def _is_peft(model: nn.Module) -> bool:
    return callable(getattr(model, "disable_adapter", None))
