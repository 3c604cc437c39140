"""An lm_head under tensor parallelism, by transformers' tp_plan and by torch's own styles: loss, log-probs and every
gradient are those of one process, over two ranks with vocabularies of 76 and 75."""

import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

from tests.ranks import run_ranks
from tests.test_sharded import make_model
from tests.tiny_training import tiny_model, tiny_trainer
from var_kernels.integrations.hf import fused_lm_head, token_logprobs
from var_kernels.integrations.hf.capture import capture

T, V = 10, 151
BATCHES = ("plain", "ignored")


def make_batch(name):
    ids = torch.randint(1, V, (4, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    if name == "ignored":
        labels.fill_(-100)
    return {"input_ids": ids, "labels": labels}


def gradients(model):
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        parameter.grad = None
    return found


def measured(model):
    """{what: (value, gradients)} of the loss and of log-probs with entropy."""
    results = {}
    for name in BATCHES:
        batch = make_batch(name)
        with fused_lm_head(model, workspace_mb=0.5):
            loss = model(**batch).loss
            counted = model(**batch, num_items_in_batch=torch.tensor(50)).loss
        (loss + counted).backward()
        results["loss", name] = torch.stack([loss, counted]).detach(), gradients(model)
    batch = make_batch("plain")
    logp, entropy = token_logprobs(model, batch, return_entropy=True, temperature=1.3)
    (logp.square().sum() + 0.3 * (entropy * torch.arange(T)).sum()).backward()
    results["log-probs", "plain"] = torch.stack([logp, entropy]).detach(), gradients(model)
    return results


def by_plan(folder, mesh):
    """What AutoModelForCausalLM.from_pretrained(tp_plan="auto") gives."""
    from transformers import LlamaForCausalLM

    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases want it in a DistributedConfig
        return LlamaForCausalLM.from_pretrained(folder / "model", tp_plan="auto", **options).eval()


def by_torch(folder, mesh, output=None, local=True):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    style = ColwiseParallel(output_layouts=output or Replicate(), use_local_output=local)
    return parallelize_module(make_model(), mesh, {"lm_head": style})


def by_torch_sliced(folder, mesh):
    from torch.distributed.tensor import Shard

    return by_torch(folder, mesh, Shard(-1))


def by_torch_rowwise(folder, mesh):
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    return parallelize_module(make_model(), mesh, {"lm_head": RowwiseParallel()})


def fused_loss(model, batch):
    with fused_lm_head(model):
        return model(**batch).loss


def refusal(call, *args, **options):
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)
    return None


def run_rank(rank, world, folder):
    mesh = dist.init_device_mesh("cpu", (world,))
    results = {}
    for make in (by_plan, by_torch):
        try:
            model = make(folder, mesh)
        except ValueError as error:  # transformers 5.17 splits evenly or not at all
            results[make.__name__] = str(error)
            continue
        results[make.__name__] = measured(model)
        results["rows", make.__name__] = model.lm_head.weight.to_local().shape[0]
    batch = make_batch("plain")
    inputs = {"input_ids": batch["input_ids"]}
    results["other loss"] = refusal(capture, model, lambda hidden, head: hidden.sum(), inputs)
    for make in (by_torch_sliced, by_torch_rowwise):
        results[make.__name__] = [refusal(call, make(folder, mesh), batch) for call in (fused_loss, token_logprobs)]
    results["trainer"] = refusal(tiny_trainer, folder, model=by_plan(folder / "trained", mesh), ddp_backend="gloo")
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    make_model().save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "trained" / "model")
    run_ranks(run_rank, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process():
    return measured(make_model())


@pytest.mark.parametrize("what", [("loss", "plain"), ("loss", "ignored"), ("log-probs", "plain")], ids="-".join)
@pytest.mark.parametrize("layout", ["by_plan", "by_torch"])
def test_equals_one_process(ranks, one_process, layout, what):
    value, wanted = one_process[what]
    # the plan splits the body too, whose norms and softmax round to fp32
    tolerance = 3e-7 if layout == "by_plan" else 1e-11
    for found in ranks:
        if "must be divisible" in found[layout]:
            pytest.skip(found[layout])
        got, grads = found[layout][what]
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance)
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            bound = tolerance * grad.abs().max().item()
            assert (grads[name] - grad).abs().max().item() <= bound, f"{layout} {name}"


def test_the_vocabulary_is_spread_unevenly(ranks):
    for layout in ("by_plan", "by_torch"):
        if "must be divisible" not in ranks[0][layout]:
            assert [found["rows", layout] for found in ranks] == [76, 75]


def test_the_trainer_wants_rows_of_each_ranks_own(ranks):
    for found in ranks:
        assert "model must be whole on every rank, which has rows of its own" in found["trainer"]


def test_other_losses_and_other_layouts_are_refused(ranks):
    for found in ranks:
        assert "use fused_lm_head, token_logprobs or sequence_logprobs, which support it" in found["other loss"]
        assert all("give the head ColwiseParallel(output_layouts=Replicate())" in m for m in found["by_torch_sliced"])
        assert all("use the plan 'colwise_gather_output'" in m for m in found["by_torch_rowwise"])
