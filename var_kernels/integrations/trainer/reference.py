"""The reference policy's log-probs of every token: computed once, kept on disk under the content they depend on."""

import contextlib
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_kernels.integrations.data import DataError, EncodedRows, Problem
from var_kernels.integrations.files import atomic_write, cache_folder
from var_kernels.integrations.hf import token_logprobs
from var_kernels.integrations.trainer.collator import Items, RowCollator
from var_kernels.integrations.trainer.progress import progress_bar
from var_kernels.integrations.trainer.sharding import whole_tensors

logger = logging.getLogger(__name__)
_SMALL_PART = 8  # below this share of the data only the rows that a run reads are scored


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every weight and of the configuration: equal for equal models, wherever they were loaded from. Under
    ZeRO-3 a collective."""
    digest = hashlib.sha256()
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version", "use_cache")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in whole_tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def rows_fingerprint(rows: EncodedRows) -> str:
    """Hash of the token ids and of which of them have labels: of the text, the tokenizer and max_length together."""
    digest = hashlib.sha256()
    for tensor in (rows.token_ids, rows.offset, rows.prompt_length, rows.others):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def cache_path(args, key: str) -> Path:
    return Path(args.cache_dir or cache_folder()) / "ref_logp" / f"{key}.safetensors"


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
    if trainer.args.should_save:
        _announce(rows, path, wanted)
    logp = score_rows(trainer, model, rows, wanted)
    sums = rows.row_sums(logp)
    bad = [row for row in (range(len(rows)) if wanted is None else wanted) if not sums[row].isfinite()]
    if bad:
        problems = [Problem(rows.where[row], f"the reference model's log-prob is {sums[row].item()}") for row in bad]
        remedy = "-inf: its head forbids a label of the row, drop it; nan: it overflows, load it in a wider dtype"
        raise DataError(problems, remedy=remedy)
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


def _announce(rows: EncodedRows, path: Path, wanted: Sequence[int] | None) -> None:
    if wanted is None:
        logger.info(
            "scoring %d rows (%d tokens) with the reference, once: kept in %s for this run's resumes and for others",
            len(rows), len(rows.token_ids), path.parent,
        )  # fmt: skip
    else:
        logger.info(
            "scoring %d of %d rows (%d tokens) with the reference: those that the run's steps read",
            len(wanted), len(rows), sum(rows.length(row) for row in wanted),
        )  # fmt: skip


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
    except Exception as error:
        logger.warning("%s cannot be read (%s): computed anew", path, error)
        return None
    return logp if logp.shape == (num_tokens,) and logp.isfinite().all() else None


@torch.no_grad()
def score_rows(trainer, model: nn.Module, rows: EncodedRows, wanted: Sequence[int] | None = None) -> Tensor:
    """(tokens,) fp32 log-probs of the completions' tokens under ``model``, 0 in the prompts; NaN in rows that are not
    ``wanted`` (None: all are)."""
    start = 0.0 if wanted is None else math.nan
    logp = torch.full((len(rows.token_ids),), start, device=trainer.accelerator.device)

    def score(batch: dict[str, Tensor], members: list[int]) -> None:
        scored = score_batch(trainer, model, batch).float()[: len(members)]
        for row, values in zip(members, scored, strict=True):
            logp[rows.offset[row] : rows.offset[row + 1]] = values[: rows.length(row)]

    over_rows(trainer, model, rows, score, "reference log-probs", wanted)
    return trainer.accelerator.reduce(logp, "sum").cpu()


def over_rows(
    trainer, model: nn.Module, rows: EncodedRows, visit, title: str, wanted: Sequence[int] | None = None
) -> None:
    """``visit(batch, its row numbers)`` for this rank's share of the rows, or of the ``wanted`` ones, in batches of
    rows of like length, with the model in eval mode.

    Every rank makes as many visits, the last perhaps of a row that is none of its own (no row numbers): a forward pass
    of sharded weights is a collective.
    """
    args, accelerator = trainer.args, trainer.accelerator
    members = range(len(rows)) if wanted is None else wanted
    order = sorted(members, key=rows.length, reverse=True)  # out of memory, if at all, at the first batch
    size = args.per_device_eval_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    items, collate = Items(rows, [[row] for row in range(len(rows))]), RowCollator(trainer.pad_token_id)
    was_training = model.training
    model.eval()
    try:
        ranks = accelerator.num_processes
        own = batches[accelerator.process_index :: ranks]
        own += [[]] * (-(-len(batches) // ranks) - len(own))
        tokens = [sum(rows.length(row) for row in batch) for batch in own]
        with progress_bar(args, title, sum(tokens), "token") as advance:
            for batch, count in zip(own, tokens, strict=True):
                visit(collate([items[row] for row in batch or order[-1:]]), batch)
                advance(count)
    finally:
        model.train(was_training)


def score_batch(trainer, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) fp32 log-probs of a collated batch's labels, computed as the training step computes them (same
    autocast)."""
    device = trainer.accelerator.device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad(), trainer.accelerator.autocast():
        options = {"temperature": trainer.args.logp_temperature, "workspace_mb": trainer.args.workspace_mb}
        return token_logprobs(model, inputs, **options)
