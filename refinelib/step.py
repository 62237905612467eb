"""One training step: compiled where that pays, and on CUDA replayed as one CUDA graph.

    host                         device (captured once as a CUDA graph, then replayed)
    which ROIs, which faults ->  crops -> augmentation -> model -> loss -> backward -> guard -> report
                                          `------------------- compiled -----------------'

The graph holds the whole step, the guard's decision included, without host-device synchronisation.
"""

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refinelib import modeling, ranks
from refinelib.build import StepParts, autocast, resolve_auto
from refinelib.config import Settings, absolute
from refinelib.data.loader import Plan
from refinelib.guard.measure import ran_out
from refinelib.modeling.roi import canvas_size

#: Steps before a CUDA graph is captured: libraries choose kernels, the optimizer makes its state.
WARM_UP = 3
#: Seconds that a compilation takes with an empty cache, and seconds that compiled code saves: in any step,
#: and for each ROI of 64 x 64 at ``width`` 1. Measured on an H100 and an H200 (bench/speed.md).
COMPILE_SECONDS, SAVED_A_STEP, SAVED_A_ROI = 120.0, 3.5e-3, 1.8e-3
#: The compiler keeps its code here, unless this variable names another folder.
CACHE_VARIABLE, CACHE = "TORCHINDUCTOR_CACHE_DIR", "outputs/compiled"
#: Options of the compiler (bench/speed.md). A micro-batch below this many of those ROIs waits for launches:
#: independent kernels become one (measured from this release on). Above it a step is bandwidth-bound: fewer
#: results are written to memory, more are computed again.
LARGE = 8.0
FEWER_KERNELS, FEWER_KERNELS_SINCE = {"combo_kernels": True}, (2, 11)
LESS_TRAFFIC = dict(realize_opcount_threshold=100, realize_reads_threshold=8, realize_acc_reads_threshold=16)

#: The tensors that a micro-batch is made from: see :meth:`~refinelib.data.loader.BatchLoader.inputs`.
Inputs = tuple[Tensor, ...]
Say = Callable[[str], None]


class Stepper:
    """Takes training steps.

    Args:
        settings: precision, ``accumulate``, ``compile`` and ``cuda_graphs``.
        parts: of the run's steps.
        device: of the parts.
        steps: of the run; with ``compile: auto`` a short run is not compiled.
        say: receives messages about speed and memory.
    """

    def __init__(
        self, settings: Settings, parts: StepParts, *, device: torch.device, steps: int, say: Say = print
    ) -> None:
        # Resolved here: asking a GPU what it can do would break the compiled graph in two.
        self.settings, self.device, self.say = resolve_auto(settings, device), device, say
        self.model, _, self.loss, self.guard, self.injector, self.loader = parts
        self.stop = torch.zeros(1, device=self.guard.memory.device)  # 1: this rank was asked to stop
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self.eager
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Inputs] = []  # what the graph reads, a tuple for each micro-batch
        self.report = torch.empty(0)  # what the graph writes
        self.taken = 0  # steps without the graph
        self.chunks = 1  # of each micro-batch; more where it does not fit into memory
        on_gpu = device.type == "cuda"
        # Only fused optimizers run without the host.
        self.captures = on_gpu and settings.cuda_graphs and self.guard.fused
        pays = on_gpu and worth_compiling(settings, steps)
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and pays)
        if self.compiled:
            os.environ.setdefault(CACHE_VARIABLE, str(absolute(CACHE)))
            options = compiler_options(self.settings, device)
            self.forward = torch.compile(self.eager, dynamic=False, options=options)
            self.loader.compile(options)
            self.guard.compile()

    def step(self, plan: Plan, at: int, number: int) -> Tensor:
        """Step ``at`` of a planned epoch, the run's step ``number`` (from 1).

        Returns:
            Loss components and the guard's report, float32, still on the device.
        """
        self.injector.start(number)
        batches = [self.loader.inputs(plan, at, micro) for micro in range(self.settings.accumulate)]
        if self.graph is not None:
            for mine, new in zip(self.inputs, batches, strict=True):
                for target, source in zip(mine, new, strict=True):
                    target.copy_(source, non_blocking=True)
            self.graph.replay()
            return self.report.clone()
        with compile_cache() if self.compiled else contextlib.nullcontext():
            report = self.run_with_oom_retry(batches) if self.taken else self._first(batches)
        self.taken += 1
        if self.captures and self.taken == WARM_UP:
            self._capture(batches)
        return report

    def eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Total loss and components of one micro-batch; the function that is compiled."""
        with autocast(self.settings, self.device):
            output = self.model(images)
        total, components = self.loss(output, labels)
        return total, components

    def gradient(self, inputs: list[Inputs]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss components and total loss of a step; leaves the gradient with the parameters.

        The last of the three is empty where one process trains, else what the ranks told
        (:func:`~refinelib.ranks.sum_gradients`).
        """
        self.guard.zero_grad()
        batches = [self.injector.batch(*self.loader.make(*each)) for each in inputs]
        samples = self.loader.batch_size * len(batches)  # of all ranks
        components: Tensor | None = None
        for whole in batches:
            for images, labels in zip(*(x.tensor_split(self.chunks) for x in whole), strict=True):
                loss, parts = self.forward(images.contiguous(memory_format=torch.channels_last), labels)
                loss = self.injector.loss(loss)
                if len(labels) != samples:  # every loss is a mean over samples
                    loss, parts = loss * (len(labels) / samples), parts * (len(labels) / samples)
                self.guard.backward(loss)
                components = parts if components is None else components + parts
        self.injector.after_backward()
        total = self.guard.total
        assert components is not None and total is not None  # a step has a batch
        if ranks.count() == 1:
            return components, total, self.stop[:0]
        values = torch.cat([components, total.view(1)])
        values, told = ranks.sum_gradients(self.guard.parameters, values, self.stop)
        return values[:-1], values[-1], told

    def run_with_oom_retry(self, inputs: list[Inputs]) -> Tensor:
        """A whole step, in more and more chunks until it fits into memory; equal but for rounding.

        Raises:
            RuntimeError: a single ROI does not fit (:func:`~refinelib.guard.measure.ran_out`).
        """
        while True:
            try:
                components, total, told = self.gradient(inputs)
                break
            except RuntimeError as error:
                if not (ran_out(error) and self.split_batch()):
                    raise
        # Outside the loop: half an update cannot be taken back.
        return torch.cat([components, self.guard.step(total), told])

    def split_batch(self) -> bool:
        """Free memory, take micro-batches in twice as many chunks; whether that is possible."""
        size = self.loader.share_size
        self.guard.zero_grad()
        torch.cuda.empty_cache()
        if self.chunks >= size:
            return False
        self.chunks = min(2 * self.chunks, size)
        self.say(f"a batch of {size} does not fit into memory: it is split into {self.chunks} chunks")
        return True

    def _first(self, inputs: list[Inputs]) -> Tensor:
        """The first step, which compiles; where that is not possible, training goes on uncompiled."""
        if self.compiled:
            self.say("compiles the training step: about two minutes on a GPU, less where it is cached")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # advice for the authors of compiled code
                    return self.run_with_oom_retry(inputs)
            except Exception as error:  # no C compiler, no Triton, an unknown operation: many kinds
                if ran_out(error):
                    raise
                cause = (str(error) or type(error).__name__).splitlines()[0]
                self.say(f"could not compile ({cause}): trains uncompiled, more slowly")
            self.compiled, self.forward = False, self.eager
            self.loader.uncompile()
            self.guard.uncompile()
        return self.run_with_oom_retry(inputs)

    def _capture(self, inputs: list[Inputs]) -> None:
        """Record a step as a CUDA graph; recording runs nothing."""
        self.inputs = [tuple(x.clone() for x in each) for each in inputs]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # With several ranks another thread watches the collectives while this one records.
            mode: dict[str, Any] = {"capture_error_mode": "thread_local"} if ranks.count() > 1 else {}
            with torch.cuda.graph(graph, **mode):
                components, total, told = self.gradient(self.inputs)
                self.report = torch.cat([components, self.guard.step(total), told])
            self.graph = graph
        except RuntimeError as error:
            self.guard.kept = None  # copies that were recorded and never made
            if ran_out(error):  # a graph has memory of its own: the chunks need steps of their own before it
                self.captures, self.taken = self.split_batch(), 0
                return
            torch.cuda.synchronize()
            self.captures = False
            self.say(f"could not capture a CUDA graph ({str(error).splitlines()[0]}): trains more slowly")


def worth_compiling(settings: Settings, steps: int) -> bool:
    """Whether so many steps on a GPU gain more time by compiled code than its compilation takes.

    A cache does not count: whether a run is compiled must not depend on earlier runs.
    """
    saved = SAVED_A_STEP + SAVED_A_ROI * settings.accumulate * _relative_size(settings)
    return steps * saved > COMPILE_SECONDS


def compiler_options(settings: Settings, device: torch.device) -> dict[str, Any] | None:
    """Options of the compiler for augmentation, model and losses; none on a CPU."""
    if device.type != "cuda":
        return None
    from torch._inductor import config  # takes seconds; not needed where nothing is compiled

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    small: dict[str, Any] = dict(FEWER_KERNELS) if release >= FEWER_KERNELS_SINCE else {}
    options = LESS_TRAFFIC if _relative_size(settings) >= LARGE else small
    return {name: value for name, value in options.items() if hasattr(config, name)} or None


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Let the compiler's disk cache keep gradients too, so that the next process need not trace them.

    By default it refuses graphs that change precision or have a gradient by hand. The graph describes both
    completely; the sources of the model are part of the key as well.
    """
    from torch._functorch import config as tracing
    from torch._inductor import config as compiler

    marked = {f"torch.amp.autocast_mode._{way}_autocast": _sources() for way in ("enter", "exit")}
    with contextlib.ExitStack() as stack:
        if hasattr(compiler, "unsafe_marked_cacheable_functions"):  # PyTorch 2.6 has neither
            stack.enter_context(compiler.patch(unsafe_marked_cacheable_functions=marked))
            stack.enter_context(tracing.patch(autograd_cache_allow_custom_autograd_functions=True))
        yield


@functools.cache
def _sources() -> str:
    """Hash of the sources of the model and its losses."""
    files = sorted(Path(str(modeling.__file__)).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _relative_size(settings: Settings) -> float:
    """Size of a micro-batch in ROIs of 64 x 64 at ``width`` 1, by the arithmetic of a step."""
    height, width = canvas_size(settings.roi_size, settings.context)
    return settings.batch_size / ranks.count() * settings.width * height * width / 64**2
