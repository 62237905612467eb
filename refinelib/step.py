"""One training step as fast as the device allows: compiled where that pays, and on CUDA replayed as one graph.

    host                         device (captured once as a CUDA graph, then replayed)
    which ROIs, which faults ->  crops -> augmentation -> model -> loss -> backward -> guard -> report
                                          `------------------- compiled -----------------'

The whole step, the guard's decision included, lies in the graph: it reads nothing back, so safety costs no launch and no wait.
Where no kernels are kept from an earlier run another process makes them (kernels.py), and steps are taken without meanwhile.
"""

from __future__ import annotations

import warnings
from typing import Callable, Iterator

import torch
from torch import Tensor

from refinelib.build import StepParts, autocast, settled
from refinelib.config import Settings
from refinelib.data.loader import Plan
from refinelib.step_kernels import Precompile, keep_note, keeping_graphs, kernels_folder, note
from refinelib.guard.guard import ran_out
from refinelib.guard.guard import Guard
from refinelib.modeling.losses import MaskLoss
from refinelib.modeling.roi import canvas_size

#: Steps before a graph is captured: kernels are chosen and the optimizer makes its state.
WARM_UP = 3
#: Bytes of the device's memory to leave alone.
SPARE = 2 * 2**30
#: Seconds that compiling takes, beside the training or before it, where no kernels are kept from an earlier run, and seconds that compiled kernels save: in any step, and
#: for each ROI of 64 x 64 at ``width`` 1. Measured on an H100 and an H200 (bench/speed.md).
COMPILING, SAVED_A_STEP, SAVED_A_ROI = 120.0, 3.5e-3, 1.8e-3
#: Options of PyTorch's compiler on CUDA (bench/speed.md). A micro-batch worth less than ``FEW`` of those ROIs waits for launches: kernels that do not depend on each
#: other become one (from the release on in which that was measured). From there on it waits for memory: fewer results in between are written down, more are computed where they are needed.
FEW = 8.0
FEWER_KERNELS, FEWER_KERNELS_SINCE = {"combo_kernels": True}, (2, 11)
LESS_TRAFFIC = {"realize_opcount_threshold": 100, "realize_reads_threshold": 8, "realize_acc_reads_threshold": 16}


class Stepper:
    """Takes steps.

    Args:
        settings: precision, ``accumulate`` and ``compile``: ``on`` waits for the kernels; ``auto`` trains while they are made.
        parts: of the run's steps.
        device: they are on.
        steps: the run has; a short one is not compiled.
        say: told in a sentence what could not be done.
    """

    def __init__(
        self,
        settings: Settings,
        parts: StepParts,
        *,
        device: torch.device,
        steps: int,
        say: Callable[[str], None] = print,
    ) -> None:
        # Settled here: asking a GPU what it can do in the middle of a step would break the compiled graph in two.
        self.settings, self.device, self.say = settled(settings, device), device, say
        self.model, self.loss, self.guard, self.injector, self.loader = parts.model, parts.loss, parts.guard, parts.injector, parts.loader
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self.eager
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[tuple[Tensor, ...]] = []  # what the graph reads, a tuple a micro-batch
        self.report: Tensor | None = None
        self.taken = 0
        self.pieces = 1  # that each micro-batch is taken in; more where it does not fit into memory
        self.compiled = False
        self.beside = False  # whether another process is to make the kernels
        self.meanwhile: Precompile | None = None  # which does
        self.captures = device.type == "cuda" and settings.cuda_graphs and self.guard.fused  # another optimizer asks the host
        if settings.compile == "on":
            self._compile()
        elif settings.compile == "auto" and device.type == "cuda" and worth_compiling(settings, steps):
            if settings.deterministic or note(self.settings).exists():  # when other kernels take over is chance
                self._compile()
            else:
                self.beside = True

    def close(self) -> None:
        """End what goes on beside the training."""
        if self.meanwhile is not None:
            self.meanwhile.close()
            self.meanwhile = None

    def step(self, plan: Plan, at: int, number: int) -> Tensor:
        """Step ``at`` of a planned epoch, the run's step ``number`` (from 1); its report, still on the device."""
        if self.beside:
            self._beside()
        self.injector.start(number)
        given = [self.loader.inputs(plan, at, micro) for micro in range(self.settings.accumulate)]
        if self.graph is not None:
            for mine, new in zip(self.inputs, given):
                for target, source in zip(mine, new):
                    target.copy_(source, non_blocking=True)
            self.graph.replay()
            report = self.report.clone()
        else:
            report = self._first(given)
            self.taken += 1
            if self.captures and self.taken == WARM_UP:
                self._capture(given)
        return report

    def eager(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Total and components of one micro-batch; also what is compiled."""
        with autocast(self.settings, self.device):
            output = self.model(images)
        return self.loss(output, labels)

    def compute(self, given: list[tuple[Tensor, ...]]) -> Tensor:
        """Everything of a step that happens on the device."""
        return self._finish(*self._gradient(given))

    def _gradient(self, given: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        """Loss components and total of a step, whose gradient is left with the parameters."""
        totals, components = [], []
        self.guard.zero_grad()
        batches = [self.injector.batch(*self.loader.make(*inputs)) for inputs in given]
        samples = sum(len(labels) for _, labels in batches)
        for images, labels in _in_pieces(batches, self.pieces):
            share = len(labels) / samples  # every loss is a mean over samples
            loss, parts = self.forward(images.contiguous(memory_format=torch.channels_last), labels)
            loss, parts = (x if share == 1 else x * share for x in (self.injector.loss(loss), parts))
            self.guard.scale(loss).backward()
            totals.append(loss.detach())
            components.append(parts)
        self.injector.after_backward()
        return sum(components[1:], components[0]), sum(totals[1:], totals[0])

    def _finish(self, components: Tensor, total: Tensor) -> Tensor:
        return torch.cat([components, self.guard.step(total)])

    def _compile(self) -> None:
        kernels_folder()  # says where they are kept
        self.compiled = True
        options = compiler_options(self.settings, self.device)
        self.forward = torch.compile(self.eager, dynamic=False, options=options)
        self.loader.compile(options)
        self.guard.compile()

    def _beside(self) -> None:
        """Have another process make the kernels, and go over to them once they are there."""
        if self.meanwhile is None:
            if self.taken < WARM_UP:  # until then nobody knows how much memory a step takes
                return
            if not self._room_for_another():
                self.say("waits for its kernels to be compiled: the device's memory does not hold the run twice")
                self._go_over()
                return
            try:
                self.meanwhile = Precompile(self.settings, store=self.loader.store.folder)
            except OSError as error:  # no more processes, no room for its messages
                self.say(f"waits for its kernels to be compiled: no other process could be started ({error})")
                self._go_over()
                return
            self.say("compiles its kernels beside the training, which goes on without them until they are there")
        problem = self.meanwhile.poll()
        if problem is None:
            return
        self.close()
        # What another process lacked (memory, most likely) this one may have by itself; what it lacks too, its own attempt will tell.
        self.say(f"waits for its kernels to be compiled: another process could not ({problem})" if problem else "goes over to compiled kernels")
        self._go_over()

    def _room_for_another(self) -> bool:
        """Whether a process that takes the same steps fits into the device's memory beside this one."""
        if self.device.type != "cuda":
            return True
        with torch.cuda.device(self.device):
            free, _ = torch.cuda.mem_get_info()
        # What the run has yet to take (validation, copies of its state), and what a process takes on a device just by being there.
        return free > 1.2 * torch.cuda.memory_reserved(self.device) + SPARE

    def _go_over(self) -> None:
        """Leave plain kernels and their graph; the next step is compiled."""
        self.beside = False
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # no graph goes while it runs
        self.graph, self.report, self.inputs, self.taken = None, None, [], 0
        self.pieces = 1  # compiled, it takes less memory
        self._let_go()
        self._compile()

    def _let_go(self) -> None:
        """Give back the memory of the step before: its gradients, and what PyTorch keeps for the next."""
        self.guard.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _first(self, given: list[tuple[Tensor, ...]]) -> Tensor:
        """A step before the graph stands. What cannot be compiled here is done without."""
        if not self.compiled:
            return self._fitting(given)
        with keeping_graphs():
            return self._fitting(given) if self.taken else self._compiling(given)

    def _compiling(self, given: list[tuple[Tensor, ...]]) -> Tensor:
        """The step that compiles."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice for whoever writes the compiled code
                report = self._fitting(given)
            if self.pieces == 1 and type(self.guard) is Guard and type(self.loss) is MaskLoss:  # another run's kernels exactly
                keep_note(self.settings)
            return report
        except Exception as error:  # no C compiler, no Triton, an operation it does not know: many kinds
            if ran_out(error):
                raise
            self.say(f"could not compile ({(str(error) or type(error).__name__).splitlines()[0]}): trains without, more slowly")
            self.compiled, self.forward = False, self.eager
            self.loader.uncompile()
            self.guard.uncompile()
            return self._fitting(given)

    def _fitting(self, given: list[tuple[Tensor, ...]]) -> Tensor:
        """:meth:`compute`, in ever smaller pieces until they fit into memory; the step is the same but for rounding.

        Raises:
            RuntimeError: one ROI alone does not fit (:func:`refinelib.guard.guard.ran_out`).
        """
        while True:
            try:
                found = self._gradient(given)
                break
            except RuntimeError as error:
                if not (ran_out(error) and self._smaller(len(given[0][-1]))):
                    raise
        return self._finish(*found)  # never twice: half an update cannot be taken back

    def _smaller(self, batch: int) -> bool:
        """Take micro-batches in twice as many pieces; whether that can still be done."""
        self._let_go()
        if self.pieces >= batch:
            return False
        self.pieces = min(2 * self.pieces, batch)
        self.say(f"a batch of {batch} does not fit into memory: it is taken in {self.pieces} pieces, with the same result")
        return True

    def _capture(self, given: list[tuple[Tensor, ...]]) -> None:
        """Record a step as a graph; recording runs nothing."""
        self.inputs = [tuple(x.clone() for x in inputs) for inputs in given]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                report = self.compute(self.inputs)
        except RuntimeError as error:
            if ran_out(error):  # a graph keeps its memory to itself: there was room for the step, not for both
                self.captures, self.taken = self._smaller(len(given[0][-1])), 0  # smaller pieces are taken, and compiled, before they are recorded
                return
            torch.cuda.synchronize()
            self.say(f"could not capture a CUDA graph ({str(error).splitlines()[0]}): trains without, more slowly")
            self.captures = False
            return
        self.graph, self.report = graph, report


def worth_compiling(settings: Settings, steps: int) -> bool:
    """Whether a run of so many steps saves more time by compiled kernels on a GPU than compiling takes.

    Kernels that an earlier run left count for nothing: whether a run is compiled must not depend on what ran before it, only when.
    """
    return steps * (SAVED_A_STEP + SAVED_A_ROI * settings.accumulate * _worth(settings)) > COMPILING


def compiler_options(settings: Settings, device: torch.device) -> dict[str, object] | None:
    """What PyTorch's compiler is told beyond its own choice, for augmentation, model and losses; the guard's decision is compiled as ever."""
    if device.type != "cuda":
        return None
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    wanted = LESS_TRAFFIC if _worth(settings) >= FEW else FEWER_KERNELS if release >= FEWER_KERNELS_SINCE else {}
    from torch._inductor import config  # seconds to import, and not needed where nothing is compiled

    return {name: value for name, value in wanted.items() if hasattr(config, name)} or None  # another release may know others


def _worth(settings: Settings) -> float:
    """A micro-batch in ROIs of 64 x 64 at ``width`` 1, by its arithmetic's share."""
    height, width = canvas_size(settings.roi_size, settings.context)
    return settings.batch_size * settings.width * height * width / 64**2


def _in_pieces(batches: list[tuple[Tensor, Tensor]], pieces: int) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        yield from zip(images.tensor_split(pieces), labels.tensor_split(pieces))
