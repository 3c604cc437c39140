"""Small heads beside the lm_head: a reward posterior per token (AVA), a value per token or sequence (A-LoL, DRO).

head = attach_head(model, RewardHead(model.config.hidden_size))      also as model.value_head, trained with the model
mu, log_sigma = head(hidden)                                         hidden: what the model feeds its lm_head
head.save_pretrained(folder); head = load_head(folder)               two small files beside the model's own
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from var_kernels.integrations.files import atomic_write
from var_kernels.integrations.hf.model import head_sizes, inner_model, unwrapped

PER = ("token", "sequence")
_NAME = "value_head"
_SHOWN = 4  # weights in an error


class _TokenHead(nn.Module):
    """W h + b with a few outputs, in fp32 whatever the model computes in; all zeros at the start."""

    outputs = 1

    def __init__(self, hidden_size: int):
        super().__init__()
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(
                f"hidden_size must be a positive int, got {hidden_size!r}; the width of the lm_head's input"
            )
        self.weight = nn.Parameter(torch.zeros(self.outputs, hidden_size))  # (outputs, D)
        self.bias = nn.Parameter(torch.zeros(self.outputs))

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def config(self) -> dict[str, object]:
        """The constructor's arguments, as they are saved."""
        return {"hidden_size": self.hidden_size}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _outputs(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., outputs), fp32 (fp64 for fp64); an fp32 copy of hidden lives until the backward."""
        if hidden.dim() < 1 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must have shape (..., {self.hidden_size}), got {tuple(hidden.shape)}; pass what the model "
                "feeds its lm_head"
            )
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), self.bias.to(dtype))

    def save_pretrained(self, folder: str | os.PathLike, name: str = _NAME, *, is_main_process: bool = True) -> None:
        """Write ``name``.safetensors (the weights) and ``name``.json (class and sizes) into the folder.

        Each file appears whole or not at all. The folder is made if need be; a model saved there is left as it is.
        Weights that FSDP2 has sharded are gathered, so every rank makes the call; is_main_process: this one writes.
        """
        from safetensors.torch import save_file

        whole = {key: v.full_tensor() if hasattr(v, "full_tensor") else v for key, v in self.state_dict().items()}
        if not is_main_process:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in whole.items()}
        text = json.dumps({"class": type(self).__name__, **self.config}, indent=2)
        with atomic_write(folder / f"{name}.safetensors") as path:
            save_file(weights, path)
        with atomic_write(folder / f"{name}.json") as path:
            path.write_text(text + "\n", encoding="utf-8")


class RewardHead(_TokenHead):
    """[mu_t, log sigma_t] of AVA's reward posterior: hidden (..., D) -> two (...), fp32 (fp64 for fp64).

    It starts at the prior N(0, 1), where the posterior's KL is 0.

    Args:
        hidden_size: D, the width of the states that the model feeds its lm_head.

    Raises:
        ValueError: a hidden size, or a hidden state, of another width.

    Source: arXiv 2411.09341.
    """

    outputs = 2

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_sigma = self._outputs(hidden).unbind(-1)
        return mu, log_sigma


class ValueHead(_TokenHead):
    """A learned value: hidden (..., D) -> (...) per token, or (B, T, D) and a mask (B, T) -> (B,) per sequence.

    Per sequence it is the value at the last position of the mask (of the prompt: V(x), as A-LoL wants it; of the
    response: a scalar reward); 0 for a row without one. All values are 0 at the start. fp32 (fp64 for fp64).

    Args:
        hidden_size: D, the width of the states that the model feeds its lm_head.
        per: "token" or "sequence".

    Raises:
        ValueError, TypeError: another width, a mask missing, of another shape, or not bool.

    Source: A-LoL, arXiv 2305.14718 (per sequence); DRO, arXiv 2405.19107 (per token).
    """

    def __init__(self, hidden_size: int, *, per: str = "token"):
        super().__init__(hidden_size)
        if per not in PER:
            raise ValueError(f"per must be one of {PER}, got {per!r}")
        self.per = per

    @property
    def config(self) -> dict[str, object]:
        return {**super().config, "per": self.per}

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.per == "token":
            if mask is not None:
                raise ValueError(
                    f"mask must be None for a head per token, got {type(mask).__name__}; mask its values, or make it "
                    "per='sequence'"
                )
            return self._outputs(hidden).squeeze(-1)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"mask must be a bool tensor (B, T) for a head per sequence, got {got}; attention_mask.bool()"
            )
        if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"mask must be (B, T) of a hidden (B, T, D), got {tuple(mask.shape)} and {tuple(hidden.shape)}; True "
                "where a token is"
            )
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask  # (B, T), 0 where the mask is off
        last_B = position.amax(1)
        rows_B = torch.arange(hidden.shape[0], device=hidden.device)
        value_B = self._outputs(hidden[rows_B, (last_B - 1).clamp(min=0)]).squeeze(-1)  # (B, D) -> (B,)
        return value_B.where(last_B > 0, 0.0)


_CLASSES = {cls.__name__: cls for cls in (RewardHead, ValueHead)}


def load_head(folder: str | os.PathLike, name: str = _NAME, *, hidden_size: int | None = None) -> _TokenHead:
    """The head that ``save_pretrained`` wrote into the folder, in fp32 on the CPU.

    Args:
        folder, name: as they were given to ``save_pretrained``.
        hidden_size: the width that the model needs; None: any.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file of another kind, weights of another size than the file says, or than hidden_size.
    """
    from safetensors.torch import load_file

    description, weights = (Path(folder) / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    for path in (description, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} must be a file of the saved head {name!r}, got no such file; call head.save_pretrained(folder)"
            )
    try:
        config = json.loads(description.read_text(encoding="utf-8"))
        head = _CLASSES[config.pop("class")](**config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{description} must describe a head ({', '.join(_CLASSES)}), got {type(error).__name__}: {error!s:.200}; "
            "save it again by head.save_pretrained(folder)"
        ) from error
    if hidden_size is not None and head.hidden_size != hidden_size:
        raise ValueError(
            f"{description}: hidden_size must be {hidden_size} for this model, got {head.hidden_size}; the head was "
            "trained on another model"
        )
    tensors = load_file(weights)
    expected = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if found != expected:
        got = dict(list(found.items())[:_SHOWN])  # any file may be of that name, with hundreds of weights
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{weights} must hold {expected}, got {got}{more}; it belongs to another {description.name}")
    head.load_state_dict(tensors)
    return head


def attach_head(model: nn.Module, head: _TokenHead, name: str = _NAME) -> _TokenHead:
    """Make the head a submodule of an HF causal LM, on the device of its lm_head, and return it.

    It is then trained, moved and counted with the model, while ``model.save_pretrained`` leaves it out (its own
    ``save_pretrained`` writes it) and ``from_pretrained`` and ``generate`` do not see it. (A plain ``model.value_head =
    head`` works too: its weights then also go into the model's file, and loading that warns of keys it does not know.)

    Args:
        model: an HF causal LM, or one wrapped by DDP, FSDP, DeepSpeed or PEFT (which freezes it: name it in
            modules_to_save, or attach it afterwards).
        head: ``RewardHead`` or ``ValueHead``.
        name: the attribute.

    Raises:
        ValueError: a head of another width than the lm_head's input; a name that the model has already.
        TypeError: not a model with an output embedding.
    """
    inner = inner_model(model)
    lm_head = inner.get_output_embeddings()
    width = head_sizes(unwrapped(lm_head))[1] if hasattr(lm_head, "in_features") else None
    if width is not None and width != head.hidden_size:
        raise ValueError(
            f"head must have hidden_size={width}, the width of {type(inner).__name__}'s lm_head, got "
            f"{head.hidden_size}; make the head for this model"
        )
    if hasattr(inner, name) and getattr(inner, name) is not head:
        raise ValueError(
            f"name must be free, but {type(inner).__name__} has an attribute {name!r}; give attach_head another name"
        )
    if lm_head is not None:
        head.to(lm_head.weight.device)
    setattr(inner, name, head)
    ours = {f"{name}.{key}" for key in head.state_dict()}
    inner._keys_to_ignore_on_save = set(inner._keys_to_ignore_on_save or ()) | ours
    return head
