"""Several processes that train one run, each on its share of every batch (``torch.distributed``).

    torchrun --nproc-per-node 2 -m refinelib train -f params/best.yaml

A *rank* is one of these processes. All of them hold the same weights and take the same steps: the gradients,
the losses and each rank's verdict on its own gradients are summed in one collective a step, before the guard
decides. What the guard sees is the same on every rank, bit for bit, so every rank takes the same decision.
Rank 0 writes the run's files; all share the validation. A process that ``torchrun`` did not start is rank 0
of one.
"""

import contextlib
import datetime
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # mypy does not see them

#: Seconds between two signs of life of a rank, and those that a rank has to end after another one has failed.
BEAT, GRACE = 1.0, 5.0
#: A gradient's square overflows float32 from here on.
LARGE = 1e19
#: How long a collective waits: rank 0 may be building a store.
PATIENCE = datetime.timedelta(hours=6)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Processes that train together.

    Example:
        >>> count()
        1
    """
    return dist.get_world_size() if dist.is_initialized() else 1


def restarts() -> int:
    """How often the launcher has started this job again after a process of it had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return dist.is_torchelastic_launched()


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator["Watch"]:
    """Join the processes that ``torchrun`` started, if it did; leave them at the end.

    Args:
        device: the setting; on CUDA each process of a host takes a GPU of its own.
        timeout: seconds after which a rank without a sign of life ends the job.

    Raises:
        ValueError: a host has more processes than GPUs.
    """
    if dist.is_initialized() or not launched() or os.environ["WORLD_SIZE"] == "1":
        yield Watch(0, 1, timeout)
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"this host has {gpus} GPUs: give --nproc-per-node {gpus}, or device cpu")
        torch.cuda.set_device(local)
    watch = Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    backend, store = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", watch.connect()
    dist.init_process_group(backend, store=store, rank=watch.own, world_size=watch.ranks, timeout=PATIENCE)
    watch.start()
    try:
        yield watch
    finally:
        watch.ended.set()
        # Waiting for ranks that failed would hang; the processes end anyway.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


class Watch(threading.Thread):
    """Gives signs of life, and ends this process where another rank gives none or has failed.

    Args:
        own: this process's number.
        ranks: how many there are; one is not watched.
        timeout: seconds after which a rank without a sign of life ends the job.
    """

    def __init__(self, own: int, ranks: int, timeout: float) -> None:
        super().__init__(daemon=True)
        self.own, self.ranks, self.timeout, self.ended = own, ranks, timeout, threading.Event()
        self.report: Callable[[str], None] = lambda sentence: None  # called before the process is ended

    def connect(self, *, job: bool = False) -> Any:
        """The ranks' key-value store; each start of a job has keys of its own, the ``job`` keeps its keys."""
        hosts_it = self.own == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=hosts_it, wait_for_workers=False, multi_tenant=True)
        return PrefixStore("refinelib/job" if job else f"refinelib/{restarts()}", store)

    def job_value(self, name: str, value: str | None = None) -> str | None:
        """Keep a value that a later start of this job finds, or find it."""
        if self.ranks == 1:
            return value
        store = self.connect(job=True)
        if value is not None:
            store.set(name, value)
        return store.get(name).decode() if store.check([name]) else None

    def cause(self, error: BaseException) -> str | None:
        """Tell the other ranks what ends this one; a sentence where another one's end was the cause."""
        if self.ranks == 1 or not isinstance(error, Exception):
            return None
        mine = f"rank {self.own} of {self.ranks} failed, {type(error).__name__}: {error}".splitlines()[0]
        try:
            first = str(self.connect().compare_set("failed", "", mine).decode())
        except RuntimeError:  # the process that holds the store has gone
            first = mine
        if not (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            return None  # an error of its own
        if first == mine and re.search("closed|reset|peer|refused", str(error), re.IGNORECASE):
            return f"a process of the other ranks was lost, and resume=true goes on ({error})".splitlines()[0]
        return None if first == mine else first

    def run(self) -> None:
        """Watch until the run has ended."""
        store = self.connect()
        beats, since, failed_at = [0] * self.ranks, [time.monotonic()] * self.ranks, math.inf
        while not self.ended.wait(BEAT):
            try:
                store.add(f"alive/{self.own}", 1)
                now = [store.add(f"alive/{other}", 0) for other in range(self.ranks)]
                failed = store.get("failed").decode() if store.check(["failed"]) else ""
            except RuntimeError:  # who holds the store has gone, and the launcher ends the others
                return
            clock = time.monotonic()
            pairs, beats = zip(now, beats, since, strict=True), now
            since = [then if new == old else clock for new, old, then in pairs]
            failed_at = min(failed_at, clock) if failed else math.inf
            silent = [other for other in range(self.ranks) if clock - since[other] > self.timeout]
            if clock - failed_at > GRACE:
                self._end(failed)
            if silent and self.own not in silent:
                numbers = ", ".join(map(str, silent))
                self._end(f"rank {numbers} of {self.ranks} has not answered for {self.timeout:g} s")

    def _end(self, what: str) -> None:
        """End a process that may be waiting for another one in a collective."""
        if not self.ended.is_set():
            sentence = f"{what}: rank {self.own} ends, and resume=true goes on from the last checkpoint"
            print(sentence, file=sys.stderr, flush=True)
            self.report(sentence)
            os._exit(1)


# -- one decision for all ------------------------------------------------------------------------------
def share(size: int, of: int | None = None) -> slice:
    """A rank's part, else this one's, of a batch of so many; their sizes differ by one at most.

    Example:
        >>> share(16)
        slice(0, 16, None)
    """
    place = rank() if of is None else of
    return slice(size * place // count(), size * (place + 1) // count())


def sum_gradients(parameters: Sequence[Tensor], values: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Sum gradients and values over all ranks, in one collective; the same bits on every rank.

    Args:
        parameters: float32; their gradients, which lie in memory as they do, are replaced by their sums.
        values: float32 ``[N]`` on their device, losses say.
        stop: float32 scalar, 1 where this rank was asked to stop.

    Returns:
        The summed values; float32 ``[1 + ranks]``: how many were asked to stop, then for each rank whether
        its own gradients or values were not finite, or too large for float32.
    """
    # Views in the order of the memory: flattening a kernel that lies channels last would copy it.
    gradients = [p.grad.as_strided((p.numel(),), (1,)) for p in parameters if p.grad is not None]
    verdicts = values.new_zeros(count())
    flat = torch.cat([*gradients, values, verdicts, stop.view(1)])
    *parts, values, verdicts, stop = flat.split([*map(len, gradients), len(values), count(), 1])
    own = torch.linalg.vector_norm(flat[: -count() - 1], math.inf)
    verdicts[rank()].copy_(~(own < LARGE))  # nan is not below it
    dist.all_reduce(flat)
    torch._foreach_copy_(gradients, parts)
    return values, torch.cat([stop, verdicts])


def tell(value: Any, source: int = 0) -> Any:
    """What rank ``source`` holds, on every rank; the others' ``value`` does not count.

    Example:
        >>> tell("a")
        'a'
    """
    return gathered(value)[source]


def gathered(value: Any) -> list[Any]:
    """What every rank holds, in their order, on every rank.

    Example:
        >>> gathered("a")
        ['a']
    """
    found = [value] * count()
    if count() > 1:
        dist.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def one_a_host_first() -> Iterator[None]:
    """The first rank of each host goes through the block before the others do, who find what it made."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if count() > 1 and not first:
        dist.all_reduce(torch.zeros(1))
    yield
    if count() > 1 and first:
        dist.all_reduce(torch.zeros(1))
