"""Arguments that do not go together and models that cannot be trained, refused before anything is written."""

import logging
import os
import re

import torch
from torch import nn

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trainer.config import AlignConfig, draws_pairs
from var_kernels.integrations.trainer.methods import METHODS
from var_kernels.integrations.trainer.sharding import rows_of

logger = logging.getLogger(__name__)

_SAMPLED = 2**20  # weights of a matrix that are looked at


def check_arguments(args: AlignConfig, train_dataset, ref_model, peft_config) -> None:
    if not isinstance(args, AlignConfig):
        got = type(args).__name__
        raise TypeError(
            f"args must be a VARConfig or a method_config(...), got {got}; VARConfig(output_dir=..., lam=...) is VAR's"
        )
    if isinstance(train_dataset, str | os.PathLike):
        raise TypeError(
            f"train_dataset must be rows, got the name {str(train_dataset)!r}; load_examples(name) reads it"
        )
    if args.sync_ref_model and peft_config is not None:
        raise ValueError(
            "sync_ref_model must be False with peft_config, where the reference is the model without its adapter and "
            "does not move, got True; drop one"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            "the launcher must start one process where transformers finds no accelerator, got "
            f"{launched}, each of which would train alone on all of the data, into one folder; pass use_cpu=True "
            "(--use-cpu) to train on CPUs together"
        )
    if args.device.type == "mps":
        raise ValueError(
            "the device must have float64, in which the weights of a batch and the metrics are summed, got Apple's "
            "mps, which has not; pass use_cpu=True (--use-cpu)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"a process must see one GPU, got {args.n_gpu}, and torch.nn.DataParallel over them would split a batch's "
            f"normaliser; start one process per GPU (torchrun --nproc-per-node {args.n_gpu} ...), or set "
            "CUDA_VISIBLE_DEVICES=0"
        )


def check_teacher(args: AlignConfig, ref_model) -> None:
    if METHODS[args.method].teacher != "given":
        return
    if ref_model is None:
        raise ValueError(
            f"ref_model: method {args.method!r} needs a teacher, got none; pass ref_model=MODEL (--teacher NAME)"
        )
    if args.sync_ref_model:
        raise ValueError(
            f"sync_ref_model must be False for method {args.method!r}, whose teacher does not move, got True; drop it"
        )


def check_online(args: AlignConfig, reward_func, sampler, ref_model) -> None:
    if not args.online:
        if sampler is not None:
            raise ValueError(
                "sampler must be None without online training, for which it draws completions, got "
                f"{type(sampler).__name__}; pass online=True in the settings, or drop it"
            )
        if draws_pairs(args.method):
            logger.warning(
                "%s on the responses of a data set: its score term is that of responses drawn by the policy "
                "(online=True draws them)", args.method,
            )  # fmt: skip
        return
    if args.importance_cap is not None and sampler is None:
        raise ValueError(
            f"importance_cap must be None without a sampler, got {args.importance_cap}; the model's own generate draws "
            "from the policy itself"
        )
    if ref_model is not None and args.refresh_reference and METHODS[args.method].reference:
        raise ValueError(
            "ref_model must be None online with refresh_reference=True, where the reference is the policy at each "
            f"iteration's start, got {type(ref_model).__name__}; pass refresh_reference=False with a reference of your "
            "own"
        )
    if reward_func is None and not (METHODS[args.method].loss.policy_labels or METHODS[args.method].teacher == "given"):
        raise ValueError(
            f"reward_func: online, method {args.method!r} needs the reward of completions that are in no data set: "
            "pass a reward function (--reward module:function) or a reward model (--reward-model PATH); only sail_pp "
            "learns without, from the policy's own labels"
        )


def check_vocabulary(model, tokenizer, role: str = "model") -> None:
    size = rows_of(model.get_input_embeddings().weight)
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer must have at most {size} tokens, the embedding rows of the {role}, got {len(tokenizer)}; "
            "use the model's own tokenizer, or resize_token_embeddings"
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse weights read from a GGUF file, which are dequantised but marked as quantised."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if str(getattr(getattr(method, "quant_method", None), "value", "")).lower() == "gguf":
        raise ValueError(
            "model: must be free of a quantiser, got weights from a GGUF file, which transformers trains neither whole "
            "nor by an adapter; save them dequantised by var_kernels.integrations.gguf_files.convert(file, folder) and "
            "load that folder"
        )


def check_learns(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model must have parameters that require a gradient, got a {type(model).__name__} with all of them "
            "frozen. An adapter that was loaded is: load it with is_trainable=True, merge it (merge_and_unload()), or "
            "pass its path in place of the model"
        )


def check_steps(model: nn.Module, args: AlignConfig) -> None:
    """Refuse fp16 weights, in which Adam divides by 0; warn where a step rounds to nothing in most bf16 weights."""
    if "adam" not in args.optim.lower():
        return
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = max(learning, key=lambda parameter: parameter.numel()).detach()
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return
    name = str(weight.dtype).removeprefix("torch.")
    if torch.tensor(args.adam_epsilon, dtype=weight.dtype) == 0:
        raise ValueError(
            f"model: weights that learn must be float32 or bfloat16, got {name}, in which adam_epsilon "
            f"{args.adam_epsilon:g} is 0; load the model in float32, with fp16=True for speed, or train an adapter "
            "(peft_config, --lora)"
        )
    weight = (weight.to_local() if hasattr(weight, "to_local") else weight).flatten()[:_SAMPLED]
    stuck = (weight + args.learning_rate == weight).double().mean().item()
    if stuck > 0.5:
        logger.warning(
            "weights in %s: a step of about learning_rate %g rounds to nothing in %.0f %% of the largest matrix; load "
            "the model in float32, or train an adapter, whose weights are fp32 (peft_config, --lora)",
            name, args.learning_rate, 100 * stuck,
        )  # fmt: skip


def check_drops(args: AlignConfig, items: int) -> None:
    """Refuse a set that is less than a batch where incomplete batches are dropped: training would end at once."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and items < batch:
        raise ValueError(
            f"dataloader_drop_last must be False where {items} items are less than a batch of all processes, {batch}, "
            "got True; drop it, or lower per_device_train_batch_size"
        )


def check_positions(model: nn.Module, rows: EncodedRows) -> None:
    """A table of learned positions ends; rows beyond it would stop the run with an index error in its middle."""
    inner = inner_model(model)
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    longest = int(rows.offset.diff().max())
    if not isinstance(limit, int) or longest <= limit:
        return
    words = inner.get_input_embeddings()
    sizes = {m.num_embeddings for m in inner.modules() if isinstance(m, nn.Embedding) and m is not words}
    if any(limit <= size <= limit + 2 for size in sizes):  # OPT and others keep two rows in front
        raise ValueError(
            f"max_length must be at most {limit}, the learned positions of the model, got a row of {longest} tokens; "
            f"set max_length={limit} or less"
        )
    logger.warning("the longest row has %d tokens; the model was made for %d (max_position_embeddings)", longest, limit)


def freeze_head(model: nn.Module) -> None:
    """An lm_head that no loss reads gets no gradient, which DistributedDataParallel waits for; tied, it is the
    embedding and does."""
    inner = inner_model(model)
    head, words = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head.weight is not words.weight:
        head.requires_grad_(False)


# The numbers from which many models call F.dropout, and none that only speaks of it (dropout_scale).
_DROPOUT = re.compile(r"(\w+_)?(dropout|pdrop)(_(p|prob|rate|ratio))?")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: of modules, and of float attributes by their names."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _DROPOUT.fullmatch(name):
                setattr(module, name, 0.0)
