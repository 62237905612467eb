"""What a decision is made of: sizes of gradients, values compared with their past, the loss scale."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: What CUDA and its libraries say when they run out of the memory that they take without PyTorch.
_OUT_OF_MEMORY = re.compile("CUDA error: out of memory|(CUBLAS_STATUS|CUDNN_STATUS|DEVICE)_ALLOC")
#: The largest finite float16.
FLOAT16_MAX = 65504.0
#: The loss scale keeps the largest gradient this many times below float16's largest number.
HEADROOM = 4.0
#: While the loss scale is searched for, an overflow is an incident only after this many in a row.
ORDINARY_OVERFLOWS = 3


def compare_with_past(
    value: Tensor, center: Tensor, spread: Tensor, seen: Tensor, *, limit: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a value, a logarithm say, with its past, and take it in.

    A value moves the statistics no further than the limit that makes it unusual (Huber, Robust Estimation of
    a Location Parameter, 1964, eq. 2.7), so one spike cannot hide the next.

    Args:
        value: float64, of any shape.
        center: running mean, of the same shape.
        spread: running mean absolute deviation, of the same shape.
        seen: number of values so far.
        limit: deviation from which a value is unusual; the first value never is.
        window: values over which the statistics look back.

    Returns:
        Whether the value is unusually large (bool); the new center; the new spread.

    Example:
        >>> import torch
        >>> past = torch.tensor(0.0), torch.tensor(0.1), torch.tensor(50.0)
        >>> unusual, *_ = compare_with_past(torch.tensor(9.0), *past, limit=torch.tensor(1.0), window=100)
        >>> bool(unusual)
        True
    """
    limit = torch.where(seen == 0, math.inf, limit)
    deviation = value - center
    moved = torch.maximum(torch.minimum(deviation, limit), -limit)
    new_center = center + (1.0 / (seen + 1)).clamp(min=1.0 / window) * moved
    widened = spread + (1.0 / seen.clamp(min=1)).clamp(min=1.0 / window) * (moved.abs() - spread)
    return deviation > limit, new_center, torch.where(seen == 0, spread, widened)


def widest(device: torch.device) -> torch.dtype:
    """The type that a device counts and sums in: float64, but float32 on Apple's GPUs, which lack it.

    Example:
        >>> widest(torch.device("cuda")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


def measured(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L2 norm and largest magnitude of each parameter's gradient, float32 ``[parameters]`` each."""
    return sizes([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def sizes(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """L2 norm and largest magnitude of each tensor, float32 ``[tensors]`` each; 0 of an empty one."""
    numbers = [plain(x) for x in tensors]
    numbers = [x if x.numel() else x.new_zeros(1) for x in numbers]
    norms, largest = (torch.stack(torch._foreach_norm(numbers, kind)).float() for kind in (2, math.inf))
    return norms, largest


def root_sizes(parameters: Sequence[Tensor]) -> Tensor:
    """Square roots of the numbers of elements, float32 ``[parameters]``, on the first one's device."""
    return torch.tensor([math.sqrt(p.numel()) for p in parameters], device=parameters[0].device)


def unscaled(norms: Tensor, largest: Tensor, scale: Tensor | float, roots: Tensor) -> tuple[Tensor, Tensor]:
    """Norms and largest magnitudes of the gradients without their loss scale.

    Args:
        norms: ``[parameters]``, from :func:`measured`, best in float64.
        largest: ``[parameters]``, likewise.
        scale: the loss scale.
        roots: from :func:`root_sizes`.
    """
    norms, largest = norms / scale, largest / scale
    # Squares of finite gradients above 1e19 overflow float32: the norm is then bounded by the largest
    # element.
    return torch.where(torch.isfinite(norms), norms, largest * roots), largest


def plain(values: Tensor) -> Tensor:
    """The numbers of a sparse or complex tensor, real and dense."""
    if values.is_sparse:
        values = values.coalesce().values()
    return torch.view_as_real(values) if values.is_complex() else values


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules that keep statistics of the batches."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def writes(norms: Sequence[nn.Module]) -> list[int]:
    """How often each buffer of those in training mode was written to."""
    return [x._version for norm in norms if norm.training for x in norm.buffers(recurse=False)]


def persistent_buffers(module: nn.Module) -> list[Tensor]:
    """Buffers that a checkpoint holds: state. The others are constants."""
    held = module.state_dict(keep_vars=True)
    return [buffer for name, buffer in module.named_buffers() if name in held]


def ruined(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Whether any of some tensors was finite before and is not now, bool; integers always are."""
    pairs = [(old, new) for old, new in zip(before, after, strict=True) if new.is_floating_point()]
    if not pairs:
        return torch.zeros((), dtype=torch.bool, device=after[0].device)
    was, now = (sizes(some)[1].isfinite() for some in zip(*pairs, strict=True))
    return (was & ~now).any()


def mean_of_processes(loss: Tensor) -> Tensor:
    """A loss, or its mean over the processes of ``torch.distributed``: all have to decide alike."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        loss = loss.clone()
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return loss


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out. The device is as it was, and a smaller batch can be tried.

    PyTorch's allocator raises ``OutOfMemoryError``. CUDA, cuBLAS and cuDNN, which allocate by themselves, end
    in another ``RuntimeError``.
    """
    cuda = isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    return cuda or isinstance(error, torch.OutOfMemoryError)


# -- the loss scale of float16 ---------------------------------------------------------------------------
def searches_scale(state: Mapping[str, Tensor], floor: float) -> Tensor:
    """Whether an overflow of float16 is how its loss scale is found.

    It is not where good steps have shown that there is room, nor after several overflows in a row.

    Args:
        state: of the guard, by name.
        floor: least loss scale.
    """
    room = (state["good_in_a_row"] > 0) & (state["headroom_peak"] * HEADROOM <= FLOAT16_MAX)
    above_floor = state["scale"].float() > floor
    return above_floor & ~room & (state["skips_in_a_row"] < ORDINARY_OVERFLOWS)


def next_scale(
    state: Mapping[str, Tensor], skip: Tensor, overflow: Tensor, largest: Tensor, floor: float, interval: int
) -> dict[str, Tensor]:
    """The loss scale's next value: back before float16 overflows, and up only where there is room.

    An overflow halves it, down to the floor; a bad loss is no overflow. It also halves when the largest
    scaled gradient has come within ``HEADROOM`` of float16's largest number: waiting for the overflow
    would cost a step. It doubles after ``interval`` good steps, if their largest gradient leaves room for it.

    Args:
        state: of the guard, by name.
        skip: whether the step is skipped, bool.
        overflow: whether the gradient is not finite though the loss is, bool.
        largest: magnitude in the scaled gradient, float64.
        floor: least loss scale.
        interval: good steps in a row after which the scale doubles.
    """
    good = state["good_in_a_row"]
    good = torch.where(skip, torch.where(overflow, 0.0, good), good + 1)
    peak = torch.where(skip, state["headroom_peak"], torch.maximum(state["headroom_peak"], largest))
    near = peak * HEADROOM > FLOAT16_MAX
    grown = (good >= interval) & ~near
    roomy = grown & (2 * HEADROOM * peak < FLOAT16_MAX)
    factor = torch.where(overflow | near, 0.5, torch.where(roomy, 2.0, 1.0))
    return {
        "scale": (state["scale"] * factor).clamp(floor, 2.0**24),
        "headroom_peak": torch.where(grown | near | overflow, 0.0, peak),
        "good_in_a_row": torch.where(grown | near, 0.0, good),
    }
