"""The shrunk model of one (model type, class) pair, with random weights that make mistakes show."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import nn

from tests.zoo.overrides import overrides
from tests.zoo.shrink import shrunk_config

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")


def pairs() -> dict[tuple[str, str], list[str]]:
    """{(model type, class): its mappings} of the installed transformers, in the order of the mappings."""
    from transformers.models.auto import modeling_auto

    found: dict[tuple[str, str], list[str]] = {}
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for model_type, classes in names.items():
            for name in classes if isinstance(classes, (tuple, list)) else (classes,):
                found.setdefault((model_type, name), []).append(mapping)
    return found


def build(model_type: str, class_name: str, *, decoder_only: bool, seed: int = 0) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_class = getattr(transformers, class_name)
    config = shrunk_config(CONFIG_MAPPING[model_type], overrides(model_type), decoder_only=decoder_only)
    wanted = model_class.config_class
    if wanted is not None and not isinstance(config, wanted):  # the text model of a composite configuration
        parts = [value for value in vars(config).values() if isinstance(value, wanted)]
        config = parts[0] if parts else config
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        part._experts_implementation = "eager"  # the others know no fp64
    torch.manual_seed(seed)
    with _without_timm():
        model = model_class(config)
    redraw(model, getattr(getattr(config, "get_text_config", lambda: config)(), "vocab_size", None))
    return model.eval()


@contextmanager
def _without_timm() -> Iterator[None]:
    """Nothing in place of picture towers that need the timm library, where it is missing: text does not run them."""
    from transformers import AutoModel

    plain = AutoModel.from_config
    if find_spec("timm") is not None:
        yield
        return

    def from_config(config, *args, **kwargs):
        try:
            return plain(config, *args, **kwargs)
        except ImportError:
            return nn.Module()

    with patch.object(AutoModel, "from_config", from_config):
        yield


def redraw(model: nn.Module, vocab: int | None) -> None:
    """Matrices N(0, 1.6 / sqrt(fan in)); biases over the vocabulary, buffers among them, N(0, 1)."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point():
                continue
            is_parameter = isinstance(tensor, nn.Parameter)
            if is_parameter and tensor.dim() >= 2 and min(tensor.shape) > 0:
                fan_in = tensor[0].numel() if tensor.dim() != 3 else tensor.shape[-1]
                tensor.normal_(std=1.6 / math.sqrt(max(fan_in, 1)))
            elif tensor.numel() and tensor.shape[-1:] == (vocab,) and tensor.numel() == vocab:
                tensor.normal_()
            elif is_parameter and not bool(tensor.isfinite().all()):
                tensor.fill_(1.0)
