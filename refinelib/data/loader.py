"""Batches of a store on the device: which ROIs, in what order, how augmented."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refinelib.data import augment
from refinelib.data import Store
from refinelib.modeling.roi import labels_from_coverage


class Batch(NamedTuple):
    """One micro-batch, ready for the model."""

    images: Tensor  # float32 [B, 3, Hc, Wc], normalised
    labels: Tensor  # int64 [B, Hm, Wm], on the mask canvas
    rois: Tensor  # int64 [B] on the CPU: places in the store


class Plan(NamedTuple):
    """A whole epoch's order and augmentation; depends on nothing but the seed and the epoch."""

    rois: Tensor  # int64 [steps, micro-batches, B], on the CPU
    augment_params: Tensor  # float32 [steps, micro-batches, B, columns], on the device
    device_rois: Tensor  # rois, on the device


class BatchLoader:
    """Serves micro-batches of a store.

    The pixels lie on the device where they take less than a quarter of its memory, and stream from the
    memory-mapped files otherwise.

    Args:
        store: of decoded ROIs.
        device: where batches are wanted.
        batch_size: ROIs a micro-batch.
        accumulate: micro-batches a step.
        mode: augmentation, see :func:`augment.draw`.
        seed: of order and augmentation.
        resident: false: stream in any case.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: torch.device,
        batch_size: int,
        accumulate: int = 1,
        mode: str = "off",
        seed: int = 0,
        resident: bool = True,
    ) -> None:
        self.store = store
        self.device = device
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.mode = mode
        self.seed = seed
        self.window = tuple(box / whole for box, whole in zip(store.roi_size, store.canvas))
        self.steps_per_epoch = max(1, len(store) // (batch_size * accumulate))
        self._augmented = self.augmented
        self.resident: tuple[Tensor, Tensor] | None = None
        if resident and device.type == "cuda":
            size = len(store) * (store.images[0].nbytes + store.coverage[0].nbytes)
            if size < torch.cuda.get_device_properties(device).total_memory / 4:
                self.resident = tuple(x.to(device) for x in store.as_tensors())

    def plan(self, epoch: int) -> Plan:
        """Order and augmentation of one epoch (from 0). ROIs beyond the last whole step wait for another epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        step_size = self.batch_size * self.accumulate
        count = self.steps_per_epoch * step_size
        order = torch.randperm(len(self.store), generator=generator)
        order = order.repeat(-(-count // len(order)))[:count]  # a store smaller than one step is repeated
        table = augment.draw(count, mode=self.mode, generator=generator)
        shape = (self.steps_per_epoch, self.accumulate, self.batch_size)
        rois = order.view(shape)
        return Plan(rois, table.view(*shape, -1).to(self.device), rois.to(self.device))

    def inputs(self, plan: Plan, step: int, micro: int = 0) -> tuple[Tensor, ...]:
        """What micro-batch ``micro`` of step ``step`` of a planned epoch is made from, on the device.

        The places in the resident store, or where it streams the pixels themselves (uint8 ``[B, Hc, Wc, 3]`` and
        ``[B, Hm, Wm, 2]``); then the augmentation's parameters.
        """
        table = plan.augment_params[step, micro]
        if self.resident is not None:
            return plan.device_rois[step, micro], table
        pixels = self.store.gather(plan.rois[step, micro])
        if self.device.type == "cuda":
            pixels = tuple(x.pin_memory().to(self.device, non_blocking=True) for x in pixels)
        return *pixels, table

    @torch.no_grad()  # always: compiled kernels belong to one mode, and whoever looks at a step's batch once more shall see what it saw
    def make(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels from :meth:`inputs`, without the host: see :class:`Batch`."""
        *source, table = inputs
        images, coverage = (x.index_select(0, source[0]) for x in self.resident) if self.resident is not None else source
        return self._augmented(images, coverage, table)

    def augmented(self, images: Tensor, coverage: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels from crops as they lie in the store; also what is compiled."""
        pixels, shares = augment.apply(images, coverage, table, mode=self.mode, window=self.window)
        return pixels, labels_from_coverage(shares.round().permute(0, 2, 3, 1))

    def compile(self, options: dict[str, object] | None = None) -> None:
        """Make batches by compiled kernels, a few in place of some sixty; the same batches but for rounding. On a CPU the augmentation takes next to nothing of a step.

        Args:
            options: of PyTorch's compiler.
        """
        if self.device.type == "cuda":
            self._augmented = torch.compile(self.augmented, dynamic=False, options=options)

    def uncompile(self) -> None:
        self._augmented = self.augmented

    def batch(self, plan: Plan, step: int, micro: int = 0) -> Batch:
        """Micro-batch ``micro`` of step ``step`` of a planned epoch."""
        return Batch(*self.make(*self.inputs(plan, step, micro)), plan.rois[step, micro])
