"""The reference policy's log-probs of every token: computed once, kept on disk under the content they depend on."""

import hashlib
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from var_kernels.integrations.data import DataError, EncodedRows, Problem
from var_kernels.integrations.hf import token_logprobs
from var_kernels.integrations.trainer.collator import Items, RowCollator
from var_kernels.integrations.trainer.progress import progress_bar
from var_kernels.integrations.trainer.sharding import whole_tensors

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """$VAR_KERNELS_CACHE, else ~/.cache/var_kernels."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VAR_KERNELS_CACHE") or Path(home) / "var_kernels")


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
    return Path(args.cache_dir or default_cache_dir()) / "ref_logp" / f"{key}.safetensors"


def cached_ref_logp(trainer, model: nn.Module, rows: EncodedRows, key: str) -> Tensor:
    """(tokens,) fp32, nats, 0 in the prompts: from the cache, or scored now (each rank its share) and kept.

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
        logger.info(
            "scoring %d rows (%d tokens) with the reference, once: kept in %s for this run's resumes and for others",
            len(rows), len(rows.token_ids), path.parent,
        )  # fmt: skip
    logp = score_rows(trainer, model, rows)
    sums = rows.row_sums(logp)
    bad = (~sums.isfinite()).nonzero().flatten().tolist()
    if bad:
        problems = [Problem(rows.where[row], f"the reference model's log-prob is {sums[row].item()}") for row in bad]
        remedy = "-inf: its head forbids a label of the row, drop it; nan: it overflows, load it in a wider dtype"
        raise DataError(problems, remedy=remedy)
    if trainer.args.should_save:
        try:
            _save(path, logp)
        except (OSError, SafetensorError) as error:  # a home that is read-only: the scores are right all the same
            logger.warning(
                "reference log-probs are not kept, a further run scores the data again: %s (%s); cache_dir "
                "(--cache-dir), or $VAR_KERNELS_CACHE, names another place", path.parent, error,
            )  # fmt: skip
    return logp


def _save(path: Path, logp: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({"ref_token_logp": logp}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
def score_rows(trainer, model: nn.Module, rows: EncodedRows) -> Tensor:
    """(tokens,) fp32 log-probs of the completions' tokens under ``model``, 0 in the prompts."""
    logp = torch.zeros(len(rows.token_ids), device=trainer.accelerator.device)

    def score(batch: dict[str, Tensor], members: list[int]) -> None:
        scored = score_batch(trainer, model, batch).float()[: len(members)]
        for row, values in zip(members, scored, strict=True):
            logp[rows.offset[row] : rows.offset[row + 1]] = values[: rows.length(row)]

    over_rows(trainer, model, rows, score, "reference log-probs")
    return trainer.accelerator.reduce(logp, "sum").cpu()


def over_rows(trainer, model: nn.Module, rows: EncodedRows, visit, title: str) -> None:
    """``visit(batch, its row numbers)`` for this rank's share of the rows, in batches of rows of like length, with the
    model in eval mode. Every rank makes as many visits, the last perhaps of a row that is none of its own (no row
    numbers): a forward pass of sharded weights is a collective."""
    args, accelerator = trainer.args, trainer.accelerator
    order = sorted(range(len(rows)), key=rows.length, reverse=True)  # out of memory, if at all, at the first batch
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
