"""What a type checker reads of the public functions is what runs: the overloads name every argument with its default,
and the values that they allow are those that are checked."""

import importlib
import inspect
import sys
import typing

import pytest
import torch
import typing_extensions

import var_kernels
from var_kernels.losses import var, weighted_sequence_nll, weights
from var_kernels.losses.checks import TOKEN_REDUCTIONS
from var_kernels.ops import (
    linear_logprob,
    linear_token_kl,
    linear_token_loss,
    linear_weighted_nll,
    signatures,
)
from var_kernels.ops.ava_literal import linear_prob_lse

needs_overloads = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps no list of overloads")
OVERLOADED = [
    var_kernels.linear_logprob,
    var_kernels.linear_weighted_nll,
    var_kernels.linear_token_loss,
    var_kernels.linear_loss,
    var_kernels.var_loss,
    weighted_sequence_nll,
    var_kernels.VARLoss.__init__,
]


def parameters(function) -> dict:
    """Name -> parameter, with the keywords of an ``Unpack[TypedDict]`` in their places."""
    found = dict(inspect.signature(function).parameters)
    for parameter in list(found.values()):
        if parameter.kind is parameter.VAR_KEYWORD and typing_extensions.get_origin(parameter.annotation):
            (keywords,) = typing_extensions.get_args(parameter.annotation)
            del found[parameter.name]
            found |= typing_extensions.get_type_hints(keywords)
    return found


@needs_overloads
@pytest.mark.parametrize("function", OVERLOADED, ids=lambda function: function.__qualname__)
def test_overloads_are_the_signature(function):
    implementation = parameters(function)
    overloads = typing.get_overloads(function)
    assert len(overloads) == 2
    for overload in overloads:
        declared = parameters(overload)
        assert set(declared) == set(implementation)
        for name, parameter in declared.items():
            ours = implementation[name]
            if not isinstance(parameter, inspect.Parameter):  # a keyword of a TypedDict, which has no default
                assert parameter == getattr(ours, "annotation", ours), name
            elif name != "self" and not name.startswith("return_"):
                assert (parameter.annotation, parameter.default) == (ours.annotation, ours.default), name


@pytest.mark.parametrize(
    ("name", "choices", "call"),
    [
        ("precision", signatures.PRECISIONS, lambda x: var_kernels.linear_logprob(H, W, Y, precision=x)),
        ("engine", signatures.ENGINES, lambda x: var_kernels.linear_weighted_nll(H, W, Y, None, engine=x)),
        ("reduction", signatures.REDUCTIONS, lambda x: var_kernels.linear_weighted_nll(H, W, Y, None, reduction=x)),
        ("direction", signatures.DIRECTIONS, lambda x: var_kernels.linear_token_kl(H, W, H, W, direction=x)),
        ("normalizer", weights.NORMALIZERS, lambda x: var_kernels.VARLoss(lam=1.0, normalizer=x)),
        ("token_reduction", TOKEN_REDUCTIONS, lambda x: var_kernels.VARLoss(lam=1.0, token_reduction=x)),
        (
            "reference",
            weights.REFERENCES,
            lambda x: var_kernels.VARLoss(lam=1.0, normalizer="batch", reference=x),
        ),
    ],
)
def test_each_declared_value_is_taken_and_no_other(name, choices, call):
    for choice in choices:
        call(choice)
    with pytest.raises(ValueError, match=f"{name} must be one of {', '.join(map(repr, choices))}, got 'other'"):
        call("other")


OPS = {
    linear_logprob: lambda **options: linear_logprob(H, W, Y, **options),
    linear_weighted_nll: lambda **options: linear_weighted_nll(H, W, Y, None, **options),
    linear_token_loss: lambda **options: linear_token_loss(H, W, Y, torch.neg, **options),
    linear_token_kl: lambda **options: linear_token_kl(H, W, H, W, **options),
    linear_prob_lse: lambda **options: linear_prob_lse(H, W, Y, alpha=1.0, **options),
}
every_op = pytest.mark.parametrize(("op", "call"), OPS.items(), ids=[op.__name__ for op in OPS])


@every_op
def test_the_options_shown_are_those_taken_with_their_defaults(op, call):
    shown = inspect.signature(op).parameters
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    known = {name: shown[name].default for name in signatures.DEFAULTS if name in shown}
    assert len(known) >= len(signatures.DEFAULTS) - 1
    assert torch.equal(call(**known), call())


@every_op
@pytest.mark.parametrize("name", ["temprature", "vocabulary", "lse", "token_wait"])
def test_an_unknown_option_is_refused_in_the_name_of_the_op(op, call, name):
    with pytest.raises(TypeError, match=rf"^{op.__name__}\(\) got an unexpected keyword argument '{name}'; its opt"):
        call(**{name: 1})


H, W, Y = torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)


def test_the_options_that_var_loss_hands_on_are_those_of_the_op():
    assert set(inspect.signature(var_kernels.linear_weighted_nll).parameters) >= var.HEAD_OPTIONS
    assert len(var.HEAD_OPTIONS) == 10


PUBLIC_MODULES = [
    *("", ".losses", ".ops", ".integrations.data", ".integrations.hf", ".integrations.trainer", ".integrations.cce"),
    *(".integrations.hf_trainer", ".integrations.liger", ".integrations.liger_chunked", ".integrations.trl"),
]


def public_functions(module):
    """Functions of a module, and methods of its classes, that a user calls by name."""
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in defined if not name.startswith("_")]):
        value = getattr(module, name)
        members = vars(value).items() if inspect.isclass(value) else [("", value)]
        for member, function in members:
            function = inspect.unwrap(getattr(function, "__func__", function))
            shown = not member.startswith("_") or member in ("__init__", "__call__")
            if shown and inspect.isfunction(function) and "var_kernels" in function.__code__.co_filename:
                yield f"{name}.{member}", function


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_parameter_and_result_of_a_public_function_is_annotated(module):
    module = importlib.import_module(f"var_kernels{module}")
    bare = []
    for name, function in public_functions(module):
        signature = inspect.signature(function)
        given = [p for p in signature.parameters.values() if p.name not in ("self", "cls", "ctx")]
        bare += [f"{name}({p.name})" for p in given if p.annotation is p.empty]
        bare += [f"{name} ->"] if signature.return_annotation is signature.empty else []
    assert not bare
