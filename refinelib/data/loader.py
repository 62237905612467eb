"""Batches of a store on the device: which ROIs, in what order, how augmented."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refinelib import ranks
from refinelib.data import augment
from refinelib.data.store import Store
from refinelib.modeling.roi import labels_from_coverage


class Batch(NamedTuple):
    """One micro-batch, ready for the model."""

    images: Tensor  # float32 [B, 3, Hc, Wc], normalised
    labels: Tensor  # int64 [B, Hm, Wm], on the mask canvas
    rois: Tensor  # int64 [B] on the CPU: places in the store


class Plan(NamedTuple):
    """A whole epoch's order and augmentation; depends on the seed and the epoch only."""

    rois: Tensor  # int64 [steps, micro-batches, B], on the CPU
    augment_params: Tensor  # float32 [steps, micro-batches, B, columns], on the device
    device_rois: Tensor  # rois, on the device


class BatchLoader:
    """Serves micro-batches of a store.

    The pixels lie on the device where they take less than a quarter of its memory, and stream from the
    memory-mapped files otherwise. Each of several processes (:mod:`refinelib.ranks`) gets its share of every
    micro-batch, the same crops as in one process.

    Args:
        store: of decoded ROIs.
        device: of the batches.
        batch_size: ROIs in a micro-batch, of all processes together.
        accumulate: micro-batches in a step.
        mode: augmentation, see :func:`refinelib.data.augment.draw`.
        seed: of order and augmentation.

    Example:
        >>> from refinelib.config import Settings
        >>> from refinelib.data import open_split
        >>> import tempfile
        >>> settings = Settings(store_dir=tempfile.mkdtemp(), max_images=4, roi_size=32, mask_size=32)
        >>> store = open_split(settings, "val", progress=False)
        >>> loader = BatchLoader(store, device=torch.device("cpu"), batch_size=2)
        >>> loader.batch(loader.plan(epoch=0), step=0).images.shape
        torch.Size([2, 3, 32, 32])
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
    ) -> None:
        self.store, self.device, self.mode, self.seed = store, device, mode, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        self.share_size = len(range(batch_size)[ranks.share(batch_size)])
        # A crop may get the person of the crop before it: a share begins with that one, which is cut off.
        self.before = ranks.count() > 1
        self.window = store.roi_size[0] / store.canvas[0], store.roi_size[1] / store.canvas[1]
        self.steps_per_epoch = max(1, len(store) // (batch_size * accumulate))
        self._augmented: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = self.augmented
        self.resident: tuple[Tensor, ...] | None = None
        if device.type == "cuda":
            size = len(store) * (store.images[0].nbytes + store.coverage[0].nbytes)
            if size < torch.cuda.get_device_properties(device).total_memory / 4:
                self.resident = tuple(x.to(device) for x in store.as_tensors())

    def plan(self, epoch: int) -> Plan:
        """Order and augmentation of one epoch (from 0); ROIs beyond its last whole step are left out."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shape = (self.steps_per_epoch, self.accumulate, self.batch_size)
        count = math.prod(shape)
        order = torch.randperm(len(self.store), generator=generator)
        rois = order.repeat(-(-count // len(order)))[:count].view(shape)  # a small store is repeated
        params = augment.draw(count, mode=self.mode, generator=generator)
        return Plan(rois, params.view(*shape, -1).to(self.device), rois.to(self.device))

    def inputs(self, plan: Plan, step: int, micro: int = 0, rank: int | None = None) -> tuple[Tensor, ...]:
        """What a rank's share of micro-batch ``micro`` of a planned epoch is made from, on the device.

        These are the places in the resident store, or the streamed pixels themselves (uint8 ``[B, Hc, Wc,
        3]`` and ``[B, Hm, Wm, C]``), then the augmentation's parameters.
        """
        mine = ranks.share(self.batch_size, rank)

        def shared(values: Tensor) -> Tensor:
            whole = values[step, micro]
            return torch.cat([whole[mine.start - 1 :][:1], whole[mine]]) if self.before else whole

        params = shared(plan.augment_params)
        if self.resident is not None:
            return shared(plan.device_rois), params
        pixels: tuple[Tensor, ...] = self.store.gather(shared(plan.rois))
        if self.device.type == "cuda":
            pixels = tuple(x.pin_memory() for x in pixels)
        pixels = tuple(x.to(self.device, non_blocking=self.device.type == "cuda") for x in pixels)
        return *pixels, params

    @torch.no_grad()  # always: compiled kernels belong to one mode
    def make(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels from :meth:`inputs`, without the host: see :class:`Batch`."""
        *source, params = inputs
        if self.resident is not None:
            source = [x.index_select(0, source[0]) for x in self.resident]
        return self._augmented(source[0], source[1], params)

    def augmented(self, images: Tensor, coverage: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels from crops as they lie in the store; this is what :meth:`compile` compiles."""
        pixels, fractions = augment.apply(images, coverage, params, mode=self.mode, window=self.window)
        labels = labels_from_coverage(fractions.round().permute(0, 2, 3, 1))
        return (pixels[1:], labels[1:]) if self.before else (pixels, labels)

    def compile(self, options: dict[str, Any] | None = None) -> None:
        """On CUDA, make batches by a few compiled kernels in place of some sixty; equal but for rounding.

        Args:
            options: of PyTorch's compiler.
        """
        if self.device.type == "cuda":
            self._augmented = torch.compile(self.augmented, dynamic=False, options=options)

    def uncompile(self) -> None:
        """Go back to plain kernels."""
        self._augmented = self.augmented

    def batch(self, plan: Plan, step: int, micro: int = 0, rank: int | None = None) -> Batch:
        """A rank's share, else this one's, of micro-batch ``micro`` of step ``step`` of a planned epoch."""
        mine = ranks.share(self.batch_size, rank)
        return Batch(*self.make(*self.inputs(plan, step, micro, rank)), plan.rois[step, micro, mine])
