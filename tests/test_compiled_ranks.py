"""torch.compile with ranks: a spread vocabulary runs outside of the graph; losses in DDP with a static graph."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.op_cases import Case
from tests.ranks import run_ranks
from var_kernels import linear_logprob, linear_token_kl, linear_weighted_nll
from var_kernels.ops import vocab_parallel_logprob


def step(hidden, weight, labels, group):
    logp = vocab_parallel_logprob(torch.tanh(hidden), weight, labels, process_group=group)
    return logp.exp().sum()


def spread_rank(rank, world, folder):
    hidden, weight, labels, _ = Case("").inputs()
    own = weight.detach()[: 300 if rank == 0 else None][0 if rank == 0 else 300 :].clone().requires_grad_()
    expected = torch.autograd.grad(linear_logprob(torch.tanh(hidden), weight, labels).exp().sum(), (hidden, weight))
    compiled = torch.compile(step, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, own, labels, dist.group.WORLD), (hidden, own))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1].split([300, 207])[rank], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    whole = torch.compile(step, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        whole(hidden, own, labels, dist.group.WORLD)


def test_a_spread_vocabulary(tmp_path):
    run_ranks(spread_rank, 2, tmp_path)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 50, bias=False)

    def forward(self, inputs, labels):
        hidden, weight = torch.tanh(self.body(inputs)), self.head.weight
        kl = linear_token_kl(hidden, weight, inputs, weight.detach() + 1, labels).sum()
        return (
            kl + linear_weighted_nll(hidden, weight, labels, None) + linear_logprob(hidden, weight, labels).exp().sum()
        )


def ddp_rank(rank, world, folder):
    torch.manual_seed(1)
    inputs, labels = torch.randn(2, 12, 16), torch.randint(50, (2, 12))
    plain = Model()
    (plain(inputs[0], labels[0]) + plain(inputs[1], labels[1])).div(2).backward()
    model = torch.compile(DistributedDataParallel(Model(), static_graph=True), backend="aot_eager")
    for _ in range(3):  # the second step relies on what the first has seen
        model.zero_grad()
        model(inputs[rank], labels[rank]).backward()
        for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_ddp_with_a_static_graph(tmp_path):
    run_ranks(ddp_rank, 2, tmp_path)
