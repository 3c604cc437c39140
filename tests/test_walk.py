"""The way of hidden states from ``linear_logprob``, a fused model and ``VARTrainer`` into the kernels, forward and
backward, is short: few files hand them on, in few Python calls. The trace is printed (``pytest -s``)."""

import sys
from pathlib import Path

import pytest
import torch

import var_kernels
from var_kernels import linear_logprob
from var_kernels.ops.backend import use_backend

ROOT = Path(var_kernels.__file__).parent
# They are given hidden states and hand them to no other file: they look at them, or multiply.
ENDS = {"ops/checks.py", "ops/plan.py"}
# Python 3.12 runs them in the function around them.
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")


def holds(value, address: int, depth: int = 3) -> bool:
    """Whether a value is the hidden states, a view of them, or an object of this package that holds them."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr() == address
    if isinstance(value, tuple | list):
        return any(holds(item, address, depth - 1) for item in value) if depth else False
    inside = type(value).__module__.startswith("var_kernels") and hasattr(value, "__dict__")
    return inside and depth > 0 and any(holds(item, address, depth - 1) for item in vars(value).values())


def walk() -> tuple[list[tuple[str, str]], set[str], set[str]]:
    """(file, function) of every Python call in this package; files that are given hidden states; files that hand them
    on to another one.
    """
    hidden = torch.randn(64, 64, requires_grad=True)
    weight, labels = torch.randn(1000, 64, requires_grad=True), torch.randint(1000, (64,))
    address, calls, given, handing = hidden.untyped_storage().data_ptr(), [], set(), set()

    def of_package(frame) -> str | None:
        path = Path(frame.f_code.co_filename)
        return str(path.relative_to(ROOT)) if ROOT in path.parents else None

    def profile(frame, event, _):
        name = of_package(frame) if event == "call" else None
        if name is None or frame.f_code.co_name in INLINED:
            return
        calls.append((name, frame.f_code.co_name))
        if not any(holds(value, address) for value in frame.f_locals.values()):
            return
        given.add(name)
        caller = frame.f_back
        while caller is not None and of_package(caller) is None:  # autograd's own frames
            caller = caller.f_back
        if caller is not None and of_package(caller) != name:
            handing.add(of_package(caller))

    def step():
        linear_logprob(hidden, weight, labels).sum().backward()

    with use_backend("torch"):
        step()  # imports
        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
    return calls, given, handing


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is at work")
def test_hidden_states_go_through_few_files():
    calls, given, handing = walk()
    files = {name for name, _ in calls}
    before_kernels = {name for name in files if not name.startswith("kernels/")}
    ends = {name for name in given - handing if not name.startswith("kernels/")}
    print(f"\n{len(calls)} Python calls in {len(files)} files, {len(before_kernels)} of them outside of kernels/")
    print("handed on by", *sorted(handing), "| ended in", *sorted(given - handing))
    assert {"ops/logprob.py", "ops/engines.py"} <= handing
    assert len(handing) <= 4
    assert ends <= ENDS
    assert len(before_kernels) <= 7
    assert len(calls) <= 99


def outside_of_kernels(run) -> list[str]:
    """Files of this package, kernels/ apart, whose code one more run of ``run`` passes through."""
    seen = {}

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents:
            seen[str(path.relative_to(ROOT))] = None

    with use_backend("torch"):
        run()  # imports, and the trials of the model
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(None)
    found = [name for name in seen if not name.startswith("kernels/")]
    print(f"\n{len(found)} files:", *found)
    return found


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is at work")
def test_a_fused_model_goes_through_few_files():
    pytest.importorskip("transformers")
    from tests.tiny_training import tiny_model
    from var_kernels.integrations.hf import fused_lm_head

    model, ids = tiny_model(), torch.randint(3, 200, (2, 8))

    def whole():
        with fused_lm_head(model):
            model(input_ids=ids, labels=ids).loss.backward()

    assert len(outside_of_kernels(whole)) <= 13


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is at work")
def test_a_step_of_training_goes_through_few_files(tmp_path):
    pytest.importorskip("transformers")
    from tests.tiny_training import tiny_trainer

    trainer = tiny_trainer(tmp_path)
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert len(outside_of_kernels(lambda: trainer.compute_loss(trainer.model, dict(batch)).backward())) <= 18
