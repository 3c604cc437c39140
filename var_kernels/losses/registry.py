"""The losses by name: what each one reads, what an item of its batch is, and which passes over the head it may take."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

PASS_CLASSES = {
    "A": "the gradient per token is known before the forward pass: one pass",
    "B": "it depends on that token's own log-prob and entropy: one pass",
    "C": "it depends on the sequence, its pair or its prompt's other completions: two passes",
    "D": "it depends on the whole global batch: two passes with a collective between them",
}
ITEMS = ("sequence", "pair", "group", "token")
LOSSES: dict[str, "Loss"] = {}


@dataclass(frozen=True)
class Loss:
    """A loss and what is to be known about it.

    The function's signature is the declaration: positional parameters are tensors by their canonical names, the
    policy's log-probs first; keyword-only parameters are the method's options. It returns one loss an item.

        item        policy's log-probs                                  and, as they are needed
        sequence    policy_logp (B,)                                    ref_logp, reward, value, lengths (B,)
        group       policy_logp (B,) with group_ids (B,)                the same; rows of a prompt share an id
        pair        policy_chosen_logp, policy_rejected_logp (P,)       ref_chosen_logp, chosen_reward, chosen_lengths
        token       token_logp (...)                                    old_token_logp, ref_token_logp, advantage (...)
    """

    name: str
    function: Callable
    pass_class: str
    item: str
    formula: str
    source: str
    evidence: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that the function takes, in its order."""
        return tuple(p.name for p in self._parameters() if p.kind is p.POSITIONAL_OR_KEYWORD)

    @property
    def options(self) -> dict[str, object]:
        """Options and their defaults; ``inspect.Parameter.empty`` where one must be given."""
        return {p.name: p.default for p in self._parameters() if p.kind is p.KEYWORD_ONLY}

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())


def register(name: str, *, pass_class: str, item: str, formula: str, source: str, evidence: str) -> Callable:
    """Decorator: enter the function into ``LOSSES`` under ``name``; the function itself is returned as it is.

    evidence: "paper", "code" (the authors'), "third-party code", "derived" or "unverified".
    """
    assert pass_class in PASS_CLASSES, pass_class
    assert item in ITEMS, item
    assert name not in LOSSES, name

    def enter(function: Callable) -> Callable:
        LOSSES[name] = Loss(name, function, pass_class, item, formula, source, evidence)
        return function

    return enter
