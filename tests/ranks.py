"""CPU processes, alone or several with gloo, forked from one that has imported everything: a start costs a tenth of a
second.
"""

import contextlib
import datetime
import gc
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HANG = 1800.0  # seconds after which what is waited for hangs: no bound on how slow a loaded machine may be
PRELOADED = ("torch.distributed.fsdp", "transformers", "tests.tiny_training")


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_alone(function, folder: Path, *args) -> subprocess.CompletedProcess:
    """``function(*args)`` in a process of its own, to its end: exit status, standard output and error."""
    streams = [folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
    process = _context().Process(target=_run_alone, args=(function, streams, args), daemon=True)
    process.start()
    (code,) = end_of_ranks([process], HANG)
    return subprocess.CompletedProcess(function, code, *(path.read_text() for path in streams))


def _run_alone(function, streams: list[Path], args) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    torch.set_num_threads(1)
    gc.freeze()
    code = function(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def start_ranks(
    function, world: int, folder: Path, *args, environment: dict[str, str] | None = None, timeout: float = HANG
) -> list:
    """Processes that run ``function(rank, world, folder, *args)`` in a process group of that timeout, in seconds."""
    context, store = _context(), folder / f"store-{time.monotonic_ns()}"
    processes = [
        context.Process(
            target=_run_rank, args=(function, rank, world, folder, store, args, environment or {}, timeout), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(function, world: int, folder: Path, *args, timeout: float = HANG, environment=None) -> None:
    """Runs them to their end.

    Raises:
        AssertionError: a rank failed, with what it printed on its way out, or the time was up; none is left running.
    """
    processes = start_ranks(function, world, folder, *args, environment=environment)
    codes = end_of_ranks(processes, timeout)
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(errors)[-6000:]


def end_of_ranks(processes: list, timeout: float, wait_for: int | None = None) -> list[int | None]:
    """The exit codes once all, or the first ``wait_for``, have ended; one that still runs then is killed, and None."""
    deadline = time.monotonic() + timeout
    for process in processes[:wait_for]:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _run_rank(function, rank, world, folder, store, args, environment, timeout) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": "", **environment})
    torch.set_num_threads(1)
    gc.freeze()  # garbage is no more looked for in what was imported before the fork, whose pages stay shared
    limit = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
        function(rank, world, folder, *args)
        if dist.is_initialized():  # the command line ends it itself
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        import traceback

        (folder / f"error-{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # torch's own threads may abort an orderly exit, now and then


@contextlib.contextmanager
def as_accelerators():
    """In a rank: accelerate takes CPUs for accelerators, on which alone it offers FSDP and ZeRO."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    backend = PartialState._prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = backend
        del os.environ["ACCELERATE_TORCH_DEVICE"]


def compile_nothing() -> None:
    """In a rank: DeepSpeed goes without its shared-memory collectives, which take a minute to compile."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Collectives(TorchDispatchMode):
    """Inside the block, ``sent``: (name, bytes that this rank puts in) of every collective."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # the ``_base`` ones and the lists of all-gathers write into their first argument
            source = args[1] if "gather" in func.__name__ or "reduce_scatter" in func.__name__ else args[0]
            tensors = [leaf for leaf in tree_leaves(source) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func.__name__.split(".")[0], sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))
