"""A model run on a few tokens with known values in place of its head's output."""

import copy
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import arg_tree_leaves

from var_kernels.integrations.hf.forwards import (
    evaluating,
    known_arguments,
    of_a_library,
    placeholder,
    swapped,
    swapped_forward,
    swapped_head,
)
from var_kernels.integrations.hf.model import (
    decoder_inputs,
    find_head,
    input_device,
    input_embeddings,
    is_dtensor,
    is_encoder_decoder,
    local_rows,
    logits_of,
    vocabulary_size,
    without_cache,
)

_TOKENS = 8
_SMALL = 2**20  # elements; of larger buffers (packed weights) no copy is made
_MODULE_FIELDS = frozenset(vars(nn.Module()))
_NOT_INPUTS = frozenset(
    ("labels", "shift_labels", "num_items_in_batch", "return_dict", "logits_to_keep", "past_key_values", "cache")
)


class TrialFailedError(ValueError):
    """The model does not run on the trial inputs; on others it may."""


class Probe:
    """One model and the inputs that it is run on: eight tokens, or what ``inputs`` says (its first row)."""

    def __init__(self, model: nn.Module, inner: nn.Module, inputs: Mapping[str, Any] | None = None):
        self.model, self.inner, self.head = model, inner, find_head(inner)
        self.vocab = vocabulary_size(self.head)
        self.name = type(inner).__name__
        embeddings = input_embeddings(inner)
        ids = min(getattr(embeddings, "num_embeddings", self.vocab), self.vocab)
        special = set()
        for config in (inner.config, inner.config.get_text_config()):
            for name, value in vars(config).items():
                if name.endswith(("_id", "_index")):
                    special.update(value if isinstance(value, (list, tuple)) else [value])
        self.plain = [token for token in range(min(ids, 4096)) if token not in special] or [0]
        self.ids_name = "decoder_input_ids" if is_encoder_decoder(inner) else "input_ids"
        self.given = inputs is not None
        self.inputs = self._inputs(inputs) if self.given else self._few_tokens(_TOKENS)
        if any(value.device.type == "meta" for value in self.inputs.values() if isinstance(value, Tensor)):
            self.refuse("its weights are on the meta device, and it is run on a few tokens first: load them")
        self.after_head = lambda: None
        self.body: _Body | None = None

    @property
    def ids(self) -> Tensor:
        """(1, T) int64: the tokens whose successors the head predicts; the first of those of a position."""
        ids = self.inputs[self.ids_name]
        return ids if ids.dim() == 2 else ids[..., 0]

    def _few_tokens(self, count: int) -> dict[str, Any]:
        tokens = [self.plain[i % len(self.plain)] for i in range(count)]
        ids = torch.tensor([tokens], device=input_device(self.inner))
        return {"input_ids": ids, "decoder_input_ids": ids} if is_encoder_decoder(self.inner) else {"input_ids": ids}

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in given.items() if name not in _NOT_INPUTS and value is not None}
        if is_encoder_decoder(self.inner) and inputs.get("decoder_input_ids") is None and "labels" in given:
            inputs.update(decoder_inputs(self.inner, given["labels"]))
        ids = inputs.get(self.ids_name)
        if not isinstance(ids, Tensor):
            self.refuse(f"a trial forward pass needs {self.ids_name}", error=TrialFailedError)
        if ids.dim() not in (2, 3):
            self.refuse(f"its {self.ids_name} are {tuple(ids.shape)}, expected (B, T) or (B, T, streams)")
        tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
        if len({len(value) for value in tensors}) == 1:  # else something is not one entry a row: patches of images
            inputs = {n: v[:1] if isinstance(v, Tensor) and v.dim() else v for n, v in inputs.items()}
        return inputs

    def refuse(self, reason: str, cause: Exception | None = None, error: type = ValueError) -> NoReturn:
        raise error(
            f"{self.name} cannot be used with a fused lm_head: {reason}. Use its own loss, or log_softmax of its "
            "logits, instead"
        ) from cause

    def known_number(self, fitted: float) -> float:
        """The number (or its inverse) among the model's own that was fitted, free of the fit's rounding."""
        owners = (
            self.inner.config,
            self.inner.config.get_text_config(),
            self.inner,
            getattr(self.inner, self.inner.base_model_prefix, None),
        )
        own = [float(v) for o in owners if o is not None for v in vars(o).values() if isinstance(v, (int, float)) and v]
        candidates = [1.0, *own, *(1.0 / v for v in own)]
        nearest = min(candidates, key=lambda value: abs(value - fitted))
        return nearest if abs(nearest - fitted) <= 1e-5 * abs(fitted) else fitted

    # ---- passes ------------------------------------------------------------------------------------------------------

    def run(self, draw: Callable, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(injected head output, logits, hidden states); the last token changes with the seed."""
        ids, last = self.inputs[self.ids_name].clone(), self.last_token()
        others = [token for token in self.plain if token != self.ids[0, last].item()] or [0]
        ids[:, last] = others[seed % len(others)]
        injected, hidden_states, output = self._forward(draw, seed, **{**self.inputs, self.ids_name: ids})
        return injected, self._logits(injected, output), hidden_states

    def running_once(self) -> "Probe":
        """This probe, its passes on one run of all that stands before the head."""
        once = copy.copy(self)
        once.body = _Body.of(self.inner, self.head)
        return once

    def hiding_last(self) -> "Probe | None":
        """This probe with an attention_mask that hides the last token; None where that cannot be said."""
        mask = self.inputs.get("attention_mask", torch.ones_like(self.ids))
        knows = self.ids_name == "input_ids" and "attention_mask" in known_arguments(self.inner)
        if not knows or not isinstance(mask, Tensor) or mask.shape != self.ids.shape:
            return None
        hiding, mask = copy.copy(self), mask.clone()
        mask[:, -1] = 0
        hiding.inputs = {**self.inputs, "attention_mask": mask}
        return hiding

    def last_token(self) -> int:
        """The last position that the attention mask shows."""
        mask = self.inputs.get("decoder_attention_mask" if self.ids_name != "input_ids" else "attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != self.ids.shape:
            return self.ids.shape[1] - 1
        return int(mask.any(0).nonzero().max())

    def run_loss(
        self, labels: Tensor, draw: Callable, seed: int, **more: Any
    ) -> tuple[float, Tensor, Tensor, Tensor | None]:
        """(the model's own loss, logits, the labels and attention_mask that reached the inner model) on injected
        values.
        """
        seen = {}
        plain_forward = self.inner.forward

        def forward(*args, **kwargs):
            seen.update(kwargs)
            return plain_forward(*args, **kwargs)

        with swapped(self.inner, "forward", forward):
            injected, _, output = self._forward(draw, seed, **self.inputs, labels=labels, **more)
        if not isinstance(output, Mapping) and type(output) is not tuple:
            self.refuse(f"it returns a {type(output).__name__}, expected a ModelOutput, another mapping or a tuple")
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            self.refuse("it returns no scalar loss (first, in a tuple) when it is given labels")
        mask = seen.get("attention_mask", self.inputs.get("attention_mask"))
        return loss.item(), self._logits(injected, output), seen.get("labels", labels), mask

    def run_packed(self, draw: Callable, seed: int, names: Collection[str]) -> Tensor:
        """(1, 3, D) hidden states of the second of two sequences in a row, told apart by those of ``names`` that say
        so; the tokens of the first change with the seed.
        """
        ids = self._few_tokens(_TOKENS)["input_ids"]
        length = ids.shape[1] - 3
        ids[:, :length] = torch.tensor([self.plain[-1 - (i + seed * length) % len(self.plain)] for i in range(length)])
        second = (torch.arange(ids.shape[1], device=ids.device) >= length).int()
        ends = torch.tensor([0, length, ids.shape[1]], dtype=torch.int32, device=ids.device)
        told = {
            "position_ids": (torch.arange(ids.shape[1], device=ids.device) - length * second)[None],
            "seq_idx": second[None],
            "attention_mask": torch.ones_like(ids),
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
            **dict.fromkeys(("max_length_q", "max_length_k"), length),
        }
        told = {name: value for name, value in told.items() if name in names}
        return self._forward(draw, seed, input_ids=ids, **told)[1][:, length:]

    def run_decoder(self, draw: Callable, labels: Tensor, *, prepared: bool) -> Tensor:
        """The decoder's hidden states, its inputs made from labels by the model itself or by ``decoder_inputs``."""
        inputs = {name: value for name, value in self.inputs.items() if not name.startswith("decoder_")}
        inputs |= decoder_inputs(self.inner, labels) if prepared else {"labels": labels}
        return self._forward(draw, 0, **inputs)[1]

    def run_placeholder(self) -> tuple[bool, Tensor]:
        """The model must go on from a placeholder in place of logits: (whether it needs the wide one, hidden states).
        The last token is another than in ``run``.
        """
        try:
            return False, self._forward(None, 0, **self.inputs)[1]
        except TrialFailedError:
            return True, self._forward(None, 0, wide=True, **self.inputs)[1]

    def run_replaced_loss(self, labels: Tensor, *, wide: bool) -> float | None:
        """Measure what the model adds to a replaced loss_function; None when it does not use loss_function."""
        calls = []

        def loss_function(*_args, **_kwargs):
            calls.append(1)
            return torch.full((), 7.0, device=self.ids.device)

        with swapped(self.inner, "_loss_function", loss_function):
            try:
                _, _, output = self._forward(None, 0, wide=wide, **self.inputs, labels=labels)
            except ValueError:
                return None
        loss = output["loss"] if isinstance(output, Mapping) else output[0]
        return loss.item() - 7.0 if len(calls) == 1 else None

    def _forward(self, draw: Callable | None, seed: int, *, wide: bool = False, **inputs) -> tuple[Tensor, Tensor, Any]:
        calls = []

        def forward(hidden, *_args, **_kwargs):
            hidden, restore = local_rows(hidden)
            shape = hidden.shape[:-1]
            if draw is None:
                value = placeholder(hidden, vocab=self.vocab if wide else None)
            else:
                value = draw((*shape, self.vocab), torch.Generator().manual_seed(seed))
                value = value.to(hidden.device, torch.float32 if hidden.device.type == "mps" else torch.float64)
            calls.append((value, hidden))
            injected = restore(value.clone())  # softcaps may work in place
            self.after_head()
            return injected

        body = nullcontext() if self.body is None else self.body.once()
        with undisturbed(self.model), swapped_head(self.head, forward), body:
            try:
                output = self.model(**without_cache(self.inner, inputs))
            except Exception as error:
                given = "the inputs that were given" if self.given else f"{' and '.join(self.inputs)} alone"
                self.refuse(
                    f"a trial forward pass on {given} failed in {type(error).__name__}: {error}",
                    error,
                    TrialFailedError,
                )
        if len(calls) != 1:
            self.refuse(f"it calls its output embedding {len(calls)} times a forward pass")
        value, hidden = calls[0]
        return value, hidden, output

    def _logits(self, injected: Tensor, output: Any) -> Any:
        if isinstance(output, tuple):
            output = tuple(item for item in output if not (isinstance(item, Tensor) and item.dim() == 0))
        logits: Any = logits_of(output)
        if is_dtensor(logits):
            logits = logits.full_tensor()
        elif isinstance(logits, Tensor) and is_dtensor(self.head.weight) and logits.shape[-1] < injected.shape[-1]:
            self.refuse(
                f"its lm_head puts out a slice of the vocabulary on each rank ({logits.shape[-1]} of "
                f"{injected.shape[-1]}), which its own loss cannot use; give the head ColwiseParallel("
                "output_layouts=Replicate())"
            )
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        if shape is None or shape[:-1] != injected.shape[:-1] or shape[-1] > injected.shape[-1]:
            self.refuse(
                f"its head puts out {tuple(injected.shape)} but its logits are {shape} (several prediction streams, or "
                "logits of some positions only)"
            )
        if logits.dtype.itemsize < min(injected.dtype.itemsize, 4):
            self.refuse(
                f"its logits are rounded to {logits.dtype} on their way out, by FSDP's mixed precision perhaps: apply "
                "fused_lm_head (or score once) before the model is sharded"
            )
        return logits.to(torch.float64 if injected.dtype == torch.float64 else logits.dtype)

    # ---- what else may follow the head -------------------------------------------------------------------------------

    def vocabulary_vectors(self) -> list[str]:
        """Names of parameters and buffers of V elements besides the head's, one of which may be added to the logits."""
        own = {id(self.head.weight), id(self.head.bias)}
        return [
            name
            for name, tensor in self._plain_tensors()
            if tensor.dim() > 0 and tensor.numel() == tensor.shape[-1] == self.vocab and id(tensor) not in own
        ]

    @contextmanager
    def scalars_after_head(self) -> Iterator[set[str]]:
        """The yielded set gets the names of parameters and buffers of one element that a pass reads after the head.
        Watched, not replaced: other threads may be using the model.
        """
        scalars = {id(tensor): name for name, tensor in self._plain_tensors() if tensor.numel() == 1 < self.vocab}
        if not scalars:
            yield set()
            return
        with _Reads(scalars) as reads, swapped(self, "after_head", reads.begin):
            yield reads.names

    def _plain_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (*self.inner.named_parameters(), *self.inner.named_buffers()):
            whole = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
            sharded = hasattr(tensor, "_fsdp_flattened") or hasattr(tensor, "ds_id")  # by FSDP1, by ZeRO-3
            if whole and not sharded and tensor.is_floating_point():
                yield name, tensor

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values in place of parameters and buffers inside the block; the tensors are not written to."""
        with ExitStack() as stack:
            for name, value in values.items():
                module_name, _, leaf = name.rpartition(".")
                module = self.inner.get_submodule(module_name)
                store = module._parameters if leaf in module._parameters else module._buffers
                before = store[leaf]
                store[leaf] = value.to(before).view_as(before)
                stack.callback(store.__setitem__, leaf, before)
            yield


class _Body:
    """The body before the head, run in the first pass alone; later passes of the same inputs reuse its output.

    Known values replace the head's output, so nothing else of the body reaches the loss.
    """

    def __init__(self, module: nn.Module):
        self.module, self.outputs = module, []

    @classmethod
    def of(cls, inner: nn.Module, head: nn.Module) -> "_Body | None":
        module = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
        apart = isinstance(module, nn.Module) and module is not inner and all(m is not head for m in module.modules())
        # Wrappers for several ranks count passes; accelerate's hooks bring weights along.
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        wrapped = ranks or hasattr(module, "_hf_hook")
        return cls(module) if apart and not wrapped else None

    @contextmanager
    def once(self) -> Iterator[None]:
        plain, replayed = self.module.forward, iter(list(self.outputs))
        recorded = []

        def forward(*args, **kwargs):
            output = next(replayed, None) if self.outputs else plain(*args, **kwargs)
            recorded.append(output)
            return output

        with swapped_forward(self.module, forward):
            yield
        self.outputs = recorded


class _Reads(TorchDispatchMode):
    """The names of watched tensors, by their ids, that operations of this thread read from ``begin`` on."""

    def __init__(self, watched: Mapping[int, str]):
        super().__init__()
        self.watched, self.names, self.begun = watched, set(), False

    def begin(self) -> None:
        self.begun = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.begun:
            given = map(id, arg_tree_leaves(*args, **(kwargs or {})))
            self.names |= {self.watched[key] for key in given if key in self.watched}
        return func(*args, **(kwargs or {}))


def noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Moderate values, the rows in turn small and large."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    rows = x.view(-1, shape[-1])
    rows *= torch.tensor([0.1, 1.0, 8.0, 30.0], dtype=torch.float64, device="cpu").repeat(len(rows))[: len(rows), None]
    return x


def vector(inner: nn.Module, name: str) -> Tensor:
    """(V,) the parameter or buffer of that dotted name, as it is now."""
    module_name, _, leaf = name.rpartition(".")
    return getattr(inner.get_submodule(module_name), leaf).reshape(-1)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and a random state of its own; everything as before at the end."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(model):
        # not torch.manual_seed: it would seed GPUs that fork_rng does not restore
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(0)
        yield


@contextmanager
def unseen(inner: nn.Module, *, hooks: bool = False) -> Iterator[None]:
    """A trial inside the block leaves no trace in the model's buffers and counters, the user's modes and hooks,
    compiled graphs, autocast or warnings. Hooks on the model and on its head run, as they may change logits; with
    ``hooks`` all do.
    """
    with ExitStack() as stack:
        for mode in _popped_function_modes():
            stack.callback(torch.overrides._push_mode, mode)
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        head, filters = find_head(inner), list(warnings.filters)
        inside = [] if hooks else [module for module in inner.modules() if module is not inner and module is not head]
        hidden = [entry for module in inside for entry in _hidden_hooks(module)]
        state = [entry for module in inner.modules() for entry in _state(module)]
        autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
        try:
            yield
        finally:
            for live, key, hook in hidden:
                if key in live:
                    live[key] = hook
            for restore in state:
                restore()
            for kind, enabled, dtype in autocast:
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
            if warnings.filters != filters:
                warnings.filters[:] = filters  # type: ignore[index]  # a list, which typeshed calls a Sequence


def _popped_function_modes() -> list:
    """The innermost first, which is pushed back last; ``with torch.device(...)`` is one of them."""
    return [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]


def _hidden_hooks(module: nn.Module) -> Iterator[tuple[dict, int, Callable]]:
    """Hooks of the user's on this module do nothing in this thread: (the dict, its key, the hook)."""
    for live in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in live.items():
            if not of_a_library(hook):
                live[key] = partial(_in_other_threads, threading.get_ident(), hook)
                yield live, key, hook


def _in_other_threads(thread: int, hook: Callable, *args: Any, **kwargs: Any) -> Any:
    return None if threading.get_ident() == thread else hook(*args, **kwargs)


def _state(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield what restores each small buffer, and each number, list and dict of a module of the user's class."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.device.type != "meta" and buffer.numel() <= _SMALL:
            yield partial(_put_buffer, module, name, buffer, buffer.detach().clone())
    if of_a_library(type(module).forward):
        return
    for name, value in vars(module).items():
        if isinstance(value, (list, dict)) and name not in _MODULE_FIELDS:
            yield partial(_put_items, module, name, value, value.copy())
        elif isinstance(value, (bool, int, float, str, tuple, type(None))) and name != "training":
            yield partial(vars(module).__setitem__, name, value)


def _put_buffer(module: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    module._buffers[name] = buffer
    if not torch.equal(buffer, before):
        with torch.no_grad():
            buffer.copy_(before)


def _put_items(module: nn.Module, name: str, value: list | dict, before: list | dict) -> None:
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(before)
    vars(module)[name] = value
