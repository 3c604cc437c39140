"""What a model must be like before it is trained: large enough for its tokens, and without dropout."""

import logging

from torch import nn

from var_kernels.integrations.data import EncodedRows
from var_kernels.integrations.hf.model import inner_model
from var_kernels.integrations.trainer.sharding import rows_of

logger = logging.getLogger(__name__)


def check_vocabulary(model, tokenizer, role: str = "model") -> None:
    size = rows_of(model.get_input_embeddings().weight)
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the {role} embeds {size}: use the model's own "
            "tokenizer, or resize_token_embeddings"
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse weights read from a GGUF file, which are dequantised but marked as quantised."""
    method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if str(getattr(getattr(method, "quant_method", None), "value", "")).lower() == "gguf":
        raise ValueError(
            "model: must be free of a quantiser, got weights from a GGUF file, which transformers trains neither whole "
            "nor by an adapter; save them dequantised by var_kernels.integrations.pretrained.convert(file, folder) and "
            "load that folder"
        )


def check_learns(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model: expected parameters that require a gradient, got a {type(model).__name__} with all of them "
            "frozen. An adapter that was loaded is: load it with is_trainable=True, merge it (merge_and_unload()), or "
            "pass its path in place of the model"
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
            f"max_length: the longest row has {longest} tokens but the model has {limit} learned positions; set "
            f"max_length={limit} or less"
        )
    logger.warning("the longest row has %d tokens; the model was made for %d (max_position_embeddings)", longest, limit)


def freeze_head(model: nn.Module) -> None:
    """An lm_head that no loss reads gets no gradient, which DistributedDataParallel waits for; tied, it is the
    embedding and does."""
    inner = inner_model(model)
    head, words = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head.weight is not words.weight:
        head.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Modules and the float attributes from which many models call F.dropout."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(module, name, 0.0)
