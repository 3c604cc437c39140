"""The matrix products that run, as torch dispatches them: what an engine costs, without a look at its insides."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Position of the left operand.
_OPERANDS = {"mm": 0, "addmm": 1, "addmm_": 1, "product_into": 1, "product_exp": 0}


class Products(TorchDispatchMode):
    """Inside the block, ``sizes``: (m, n, k) of each product (m, k) by (k, n), torch's and the C++ kernels'; ``names``:
    of the operations.
    """

    sizes: list[tuple[int, int, int]]
    names: set[str]

    def __init__(self):
        super().__init__()
        self.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in _OPERANDS:
            self.names.add(name)
            left, right = args[_OPERANDS[name] :][:2]
            columns = len(right) if name == "product_exp" else right.shape[1]  # that one is given W, not W^T
            self.sizes.append((len(left), columns, left.shape[1]))
        return func(*args, **(kwargs or {}))

    def clear(self) -> None:
        self.sizes, self.names = [], set()

    def logits(self, depth: int) -> int:
        """Elements of the products over this depth: logits, where it is the hidden size and no gradient's."""
        return sum(m * n for m, n, k in self.sizes if k == depth)


def took_one_pass(loss: torch.Tensor) -> bool:
    """Whether a scalar loss made its gradients in the forward: it is then the op's own output."""
    return loss.grad_fn.name() in ("weighted_nll_functionBackward", "token_loss_functionBackward")
