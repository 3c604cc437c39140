"""One class: our log-probs, loss and gradients of every parameter against the model's own, from its full logits."""

import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.build import build
from tests.zoo.inputs import batch
from var_kernels.integrations.hf import fused_lm_head, token_logprobs
from var_kernels.integrations.hf.calibration import calibrate, calibrate_loss
from var_kernels.integrations.hf.fused_logits import FusedLogits
from var_kernels.integrations.hf.model import find_head, is_encoder_decoder, without_cache

RIGHT, REFUSED, WRONG, UNBUILT = "right", "refused", "wrong", "cannot be built"
_BOUND = 2**-17
_TRAIN_ONLY = {"reformer"}  # no gradients in eval mode; every dropout is 0


class CannotBeBuiltError(Exception):
    """The shrunk class does not run here by itself; the reason."""


def examine(model_type: str, class_name: str, mappings: list[str]) -> dict[str, Any]:
    """{verdict, detail, head, dtype, parameters, seconds} of one pair."""
    start = time.perf_counter()
    record: dict[str, Any] = {"type": model_type, "class": class_name, "mappings": mappings}
    try:
        model, inputs, notes = runnable(model_type, class_name, mappings)
        record["parameters"] = sum(p.numel() for p in model.parameters())
        record["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        record |= compare(model, inputs, notes)
    except CannotBeBuiltError as reason:
        record |= {"verdict": UNBUILT, "detail": str(reason)}
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record


def runnable(model_type: str, class_name: str, mappings: list[str]) -> tuple[nn.Module, dict, list[str]]:
    """A model and inputs on which its own forward gives finite logits: in fp64, or in fp32 where it cannot."""
    decoder_only = mappings[0] == "CAUSAL_LM"
    try:
        model = build(model_type, class_name, decoder_only=decoder_only)
        model.train(model_type in _TRAIN_ONLY)
    except Exception as error:
        raise CannotBeBuiltError(f"building: {_line(error)}") from error
    errors = []
    # Without what a class is not able to by itself, and without its own loss only where that never works.
    for with_loss, router, padded, dtype in itertools.product(
        (True, False), (True, False), (True, False), (torch.float64, torch.float32)
    ):
        had_router = _set_router_logits(model, router)
        if not router and not had_router:
            continue
        try:
            model = model.to(dtype)
            inputs = batch(model, encoder_decoder=is_encoder_decoder(model), padded=padded)
            _try(model, inputs, with_loss)
        except Exception as error:
            errors.append(error)
            continue
        notes = [] if router else ["without router logits, which its own forward fails with"]
        return model, inputs, notes + ([] if padded else ["without padding, which its own gradients fail with"])
    raise CannotBeBuiltError("its own forward: " + "; ".join(dict.fromkeys(map(_line, errors)))) from errors[0]


def _try(model: nn.Module, inputs: dict, with_loss: bool) -> None:
    if with_loss:
        with torch.no_grad():
            own_output(model, inputs, with_labels=True)
    logits = own_output(model, inputs, with_labels=is_encoder_decoder(model)).logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"its logits are a {type(logits).__name__}")
    logits.double().square().mean().backward()
    bad = [name for name, value in {"logits": logits, **gradients(model)}.items() if not bool(value.isfinite().all())]
    if bad:
        raise ArithmeticError(f"not finite: {bad[0]}")


def own_output(model: nn.Module, inputs: dict, *, with_labels: bool):
    return model(**without_cache(model, {n: v for n, v in inputs.items() if with_labels or n != "labels"}))


def compare(model: nn.Module, inputs: dict, notes: list[str]) -> dict[str, Any]:
    verdicts, details = [], list(notes)
    for name, part in (("log-probs", compare_logprobs), ("loss", compare_loss)):
        model.zero_grad(set_to_none=True)
        try:
            verdict, detail = part(model, inputs)
        except (ValueError, TypeError) as error:
            ours = _raised_by_us(error)
            verdict, detail = (REFUSED, str(error)) if ours else (WRONG, f"{name}: {_line(error)}")
        except Exception as error:
            verdict, detail = WRONG, f"{name}: {_line(error)}"
        verdicts.append(verdict)
        if detail and detail not in details:
            details.append(detail if verdict != REFUSED else f"{name}: {detail}")
    verdict = next((v for v in (WRONG, REFUSED) if v in verdicts), RIGHT)
    return {
        "verdict": verdict,
        "logprobs": verdicts[0],
        "loss": verdicts[1],
        "detail": "; ".join(details),
        "head": describe(model) if REFUSED not in verdicts[:1] else "",
    }


def compare_logprobs(model: nn.Module, inputs: dict) -> tuple[str, str]:
    labels = inputs["labels"]
    shift = not is_encoder_decoder(model)
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    logits = own_output(model, inputs, with_labels=not shift).logits
    if logits.shape[:-1] != labels.shape:
        token_logprobs(model, inputs)  # to be refused
        return WRONG, f"log-probs: its logits are {tuple(logits.shape)}, labels {tuple(labels.shape)}"
    expected = picked(logits, labels, shift=shift)
    reference, noise = gradients_and_noise(model, (expected * upstream).sum())
    logp = token_logprobs(model, inputs)
    error = (logp - expected).abs().max().item()
    if not error <= _BOUND * max(1, expected.abs().max().item()):
        return WRONG, f"log-probs: off by {error:.3g}"
    (logp * upstream).sum().backward()
    return wrong_gradient(gradients(model), reference, noise, "log-probs")


def compare_loss(model: nn.Module, inputs: dict) -> tuple[str, str]:
    try:
        own = own_output(model, inputs, with_labels=True).loss
    except Exception as error:
        return RIGHT, f"its own loss fails: {_line(error)}"
    if not isinstance(own, Tensor) or own.dim():
        return RIGHT, "it has no loss of its own"
    reference, noise = gradients_and_noise(model, own)
    with fused_lm_head(model):
        out = own_output(model, inputs, with_labels=True)
    if not isinstance(out.logits, FusedLogits):
        return WRONG, "loss: there are logits"
    if not abs(out.loss.item() - own.item()) <= _BOUND * max(1, abs(own.item())):
        return WRONG, f"loss: {out.loss.item():.6g}, its own {own.item():.6g}"
    out.loss.backward()
    verdict, detail = wrong_gradient(gradients(model), reference, noise, "loss")
    return compare_calls(model, inputs) if verdict == RIGHT else (verdict, detail)


def compare_calls(model: nn.Module, inputs: dict) -> tuple[str, str]:
    """The loss alone, of calls with other arguments; those that the model itself fails with are left out."""
    labels = inputs["labels"]
    calls = {
        "labels on padding": {"labels": labels.where(labels != -100, 7)},
        "num_items_in_batch": {"num_items_in_batch": torch.tensor(17)},
        "return_dict=False": {"return_dict": False},
    }
    for name, changed in calls.items():
        with torch.no_grad():
            try:
                own = _loss_in(own_output(model, {**inputs, **changed}, with_labels=True)).item()
            except Exception:
                continue
            with fused_lm_head(model):
                loss = _loss_in(own_output(model, {**inputs, **changed}, with_labels=True)).item()
        if not abs(loss - own) <= _BOUND * max(1, abs(own)):
            return WRONG, f"loss with {name}: {loss:.6g}, its own {own:.6g}"
    return RIGHT, ""


def _loss_in(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.loss


def picked(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    """(B, T) fp64: log softmax(logits) at the labels, 0 where they are -100 or where nothing comes before them."""
    logp = logits.double().log_softmax(-1)
    if shift:
        logp, labels = logp[:, :-1], labels[:, 1:]
    taken = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).where(labels != -100, 0.0)
    return nn.functional.pad(taken, (1, 0)) if shift else taken


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients_and_noise(model: nn.Module, loss: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of ``loss``, and how far they move where it is taken three times and they by 3: their rounding."""
    loss.backward(retain_graph=True)
    once = gradients(model)
    (3 * loss).backward()
    return once, {name: g / 3 - once[name] for name, g in gradients(model).items()}


def wrong_gradient(
    got: dict[str, Tensor], expected: dict[str, Tensor], noise: dict[str, Tensor], part: str
) -> tuple[str, str]:
    """rms(err) <= max(2^-17 rms(ref), 4 rms(noise)) for every parameter; one that is rounding around 0 (a key's bias:
    softmax does not see it) is held to a tenth of that share of the typical parameter's instead.
    """
    size = {name: rms(g) for name, g in expected.items()}
    if not any(size.values()):
        return WRONG, f"{part}: no parameter has a gradient"
    sizeable = sorted(value for value in size.values() if value > 1e-6 * max(size.values()))
    typical = sizeable[len(sizeable) // 2]
    for name in got.keys() | expected.keys():
        alone = got.get(name, expected.get(name))
        error = rms(got[name] - expected[name]) if name in got and name in expected else rms(alone)
        bound = max(_BOUND * max(size.get(name, 0.0), 0.1 * typical), 4 * rms(noise[name]) if name in noise else 0.0)
        if not error <= bound:
            return WRONG, f"{part}: gradient of {name} off by {error:.3g} of {size.get(name, 0.0):.3g}"
    return RIGHT, ""


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def describe(model: nn.Module) -> str:
    """What the head does, in words."""
    transform, head = calibrate(model, encoder_decoder=True), find_head(model)
    words = []
    if sum(p is head.weight for p in named_everywhere(model)) > 1:
        words.append("tied")
    if head.bias is not None:
        words.append("bias")
    if transform.vocabulary_bias:
        words.append(f"vocabulary bias ({transform.vocabulary_bias})")
    if transform.logit_scale != 1.0:
        words.append(f"scale {transform.logit_scale:.4g}")
    if transform.softcap is not None:
        words.append(f"softcap {transform.softcap:.4g}")
    if transform.vocab != head.out_features:
        words.append(f"first {transform.vocab} of {head.out_features} rows")
    if transform.masked:
        words.append(f"{len(transform.masked)} masked ids")
    try:
        rule = calibrate_loss(model, encoder_decoder=True)
    except ValueError:
        return ", ".join(words)
    if not rule.shift:
        words.append("labels not shifted")
    return ", ".join(words)


def named_everywhere(model: nn.Module) -> list[Tensor]:
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


def _set_router_logits(model: nn.Module, on: bool) -> bool:
    """Wherever a configuration of the model knows them, ask for them or not; whether one does."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    known = [config for config in configs if hasattr(config, "output_router_logits")]
    for config in known:
        config.output_router_logits = on
    return bool(known)


def _raised_by_us(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return "var_kernels" in frame.tb_frame.f_code.co_filename


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
