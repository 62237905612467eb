"""What the gradient notebook needs on disk: gradient norms by parameter and step, and once an epoch a closer look.

The norms come from the steps' own reports, so they cost nothing. The closer look (weights, updates,
histograms, the share of each loss term) reads the optimizer's state and runs one training batch
forward and, term by term, backward through ``torch.autograd.grad``: no ``.grad``, moment, weight or random
state is touched, and a run is bit for bit the same with the probe on or off.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from refinelib.data.loader import BatchLoader
from refinelib.files import by_epoch, replacing
from refinelib.gradients.read import read_file
from refinelib.guard.guard import REPORT, Guard
from refinelib.modeling.losses import MaskLoss

#: Steps kept a file, at most: every k-th, all that were skipped and those that stand out.
ROWS = 2000
#: Edges of the histograms: powers of ten of a magnitude, four bins a decade.
EDGES = np.linspace(-12.0, 4.0, 65)
#: What a file holds a row a step of.
BY_STEP = ("steps", "loss", "components", "skipped", "norms")
#: ROIs of the batch whose gradient is taken apart by loss term, at most.
BATCH = 4


class Probe:
    """Collects a run's gradient norms and writes ``gradients/epoch_0001.npz`` and so on.

    A file holds ``names`` ``[P]`` (parameters), ``modules`` ``[M]`` (the model's parts), ``module_of`` int64 ``[P]``;
    of the steps since the last file ``steps`` int64 ``[n]``, ``skipped`` bool ``[n]``, ``loss`` float32 ``[n]``,
    ``components`` float32 ``[n, T]`` (of the loss terms ``terms`` ``[T]``, before ``term_weights`` float32 ``[T]``) and ``norms`` float32 ``[n, P]`` (L2, unscaled, before clipping, kept to three
    digits); and, where the epoch was seen whole, the closer look: ``weight_norms`` and ``update_ratios`` float32 ``[P]``
    (see :func:`update_sizes`; nan before the first update and for a weight that is 0), ``weight_counts`` and ``gradient_counts``
    int64 ``[M, 66]`` (elements by magnitude between ``edges``, the first column below them, zeros included, the last above
    them or not finite) and ``term_norms`` float32 ``[T, P]`` (of each weighted loss term's gradient).

    Args:
        folder: where files go; made with the first of them.
        guard: which owns parameters, optimizer and loss scale.
        loss: whose terms are told apart.
        loader: of the training people; the first micro-batch of its first epoch is looked at, every time.
        model: crops (float ``[B, 3, H, W]``) to the model's output, in the run's precision.
        every: epochs between files; 0: the probe is off and does nothing.
        say: told, in a sentence, of a file of before that is passed over.
    """

    def __init__(
        self, folder: Path, *, guard: Guard, loss: MaskLoss, loader: BatchLoader, model: Callable[[Tensor], Any],
        every: int, say: Callable[[str], None] = warnings.warn,
    ) -> None:  # fmt: skip
        self.folder, self.guard, self.loss, self.loader, self.model = folder, guard, loss, loader, model
        self.every, self.say = every, say
        self.modules = list(dict.fromkeys(name.split(".")[0] for name in guard.names))
        self.module_of = np.array([self.modules.index(name.split(".")[0]) for name in guard.names])
        self.steps: list[int] = []
        self.reports: list[np.ndarray] = []

    def add(self, steps: Sequence[int], reports: np.ndarray) -> None:
        """Take the reports of some steps, on the host: float ``[n, T + len(REPORT) + P]``, loss components first."""
        if self.every:
            self.steps += steps
            self.reports.append(np.asarray(reports, dtype=np.float32))

    def end_epoch(self, epoch: int, *, whole: bool = True) -> Path | None:
        """Write what there is, if it is time: after every so many epochs, and after the last step of an interrupted one.

        Args:
            epoch: counted from 1.
            whole: False: the run stops inside this epoch; only the norms so far are kept, and a run that is resumed adds to them.

        Raises:
            OSError: it cannot be written; the norms wait for the next file.
        """
        if not self.every or not self.steps or (whole and epoch % self.every):
            return None
        reports, steps, terms = np.concatenate(self.reports), np.array(self.steps), self.loss.names
        components, reports = reports[:, : len(terms)], reports[:, len(terms) :]
        file = self.folder / f"epoch_{epoch:04d}.npz"
        content: dict[str, Any] = {
            "names": np.array(self.guard.names),
            "modules": np.array(self.modules),
            "module_of": self.module_of,
            "terms": np.array(terms),
            "term_weights": np.array([self.loss.weights[name] for name in terms], dtype=np.float32),
            "steps": steps,
            "loss": reports[:, REPORT.index("loss")],
            "components": components,
            "skipped": reports[:, REPORT.index("skipped")] > 0,
            "norms": reports[:, len(REPORT) :],
        }
        if whole:
            content |= self._look(reports[-1])
        self.folder.mkdir(exist_ok=True)
        self._forget_after(epoch)
        content = _thinned(self._joined(file, content))
        with replacing(file, "wb") as half:
            np.savez_compressed(half, **{**content, "norms": three_digits(content["norms"])})
        self.steps, self.reports = [], []
        return file

    # -- the closer look ---------------------------------------------------------------------------
    def _look(self, report: np.ndarray) -> dict[str, np.ndarray]:
        """Weights, updates, histograms and loss terms as they stand, read from the device in one piece."""
        parameters, device = self.guard.parameters, self.guard.parameters[0].device
        # The guard clipped the gradients where they lie; the report knows how long they were.
        recorded = torch.tensor(float(report[REPORT.index("grad_norm")]), device=device)
        with torch.no_grad():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            left = torch.stack(torch._foreach_norm(grads, 2)).norm()
            factor = torch.where(left > 0, recorded / left, 1.0)
            factor = torch.where(torch.isfinite(factor), factor, 1.0)
            parts = {
                "weight_norms": torch.stack(torch._foreach_norm(parameters, 2)),
                "update_ratios": update_sizes(self.guard.optimizer, parameters),
                "weight_counts": self._counts(parameters),
                "gradient_counts": self._counts([grad * factor for grad in grads]),
            }
        parts["term_norms"] = self._terms(device)
        flat = torch.cat([part.flatten().to(torch.float64) for part in parts.values()]).cpu().numpy()
        look, start = {"edges": EDGES}, 0
        for name, part in parts.items():
            kind = np.int64 if name.endswith("counts") else np.float32
            look[name] = flat[start : start + part.numel()].reshape(tuple(part.shape)).astype(kind)
            start += part.numel()
        return look

    def _counts(self, tensors: Sequence[Tensor]) -> Tensor:
        """Elements by magnitude, int64 ``[M, len(EDGES) + 1]``."""
        edges = torch.tensor(EDGES, dtype=torch.float32, device=tensors[0].device)
        rows = []
        for module in range(len(self.modules)):
            mine = torch.cat([x.flatten() for x, of in zip(tensors, self.module_of) if of == module])
            size = mine.float().abs().log10().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            # Sorting is exact and repeatable on every device; counting by atomic additions is neither everywhere.
            below = torch.searchsorted(size.sort().values, edges)
            ends = torch.tensor([0, len(mine)], device=below.device)
            rows.append(torch.cat([ends[:1], below, ends[1:]]).diff())
        return torch.stack(rows)

    def _terms(self, device: torch.device) -> Tensor:
        """L2 norm of each weighted loss term's gradient by parameter, float32 ``[T, P]``, unscaled."""
        batch = self.loader.batch(self.loader.plan(0), 0)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            output = self.model(batch.images[:BATCH])
            with torch.autocast(device.type, enabled=False):
                costs = self.loss.per_sample(output, batch.labels[:BATCH])
            rows = []
            for place, (name, cost) in enumerate(costs.items()):
                term = self.guard.scale(self.loss.weights[name] * cost.mean())
                grads = torch.autograd.grad(
                    term, self.guard.parameters, retain_graph=place + 1 < len(costs), allow_unused=True, materialize_grads=True
                )
                rows.append(torch.stack(torch._foreach_norm(grads, 2)).float() / self.guard.state["scale"])
        return torch.stack(rows)

    def go_back(self, step: int) -> None:
        """Drop what was collected of the steps after this one: they are taken again."""
        kept = sum(each <= step for each in self.steps)
        self.steps = self.steps[:kept]
        self.reports = [np.concatenate(self.reports)[:kept]] if kept else []

    def _forget_after(self, epoch: int) -> None:
        """Files of later epochs are from before a resume that took the run back."""
        for number, file in by_epoch(self.folder).items():
            if number > epoch:
                file.unlink(missing_ok=True)

    def _joined(self, file: Path, content: dict[str, Any]) -> dict[str, Any]:
        """``content`` behind the earlier steps that a run interrupted in this epoch left in ``file``."""
        if not file.is_file():
            return content
        try:
            old = read_file(file)
            if any(old[name].tolist() != content[name].tolist() for name in ("names", "terms")):
                raise ValueError(f"{file} is of another model")
        except (OSError, ValueError) as error:
            self.say(f"the gradients before step {content['steps'].min()} are lost: {error}")
            return content
        kept = old["steps"] < content["steps"].min()
        earlier = {name: old[name][kept].astype(content[name].dtype) for name in BY_STEP}
        return content | {name: np.concatenate([earlier[name], content[name]]) for name in BY_STEP}


def update_sizes(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor:
    """Length of Adam's last update of each parameter against the parameter's own, float32 ``[P]``.

    ``lr |m / (sqrt(v) + eps)| / |w|`` with the bias-corrected moments m and v (Kingma & Ba, 2015, algorithm 1);
    weight decay is left out. About 1e-3 is usual: well above it the weights are rewritten, well below they
    stand still. nan where no update was made yet and where the weight is 0.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    sizes = []
    for p in parameters:
        state, group = optimizer.state.get(p, {}), groups[id(p)]
        if "exp_avg" not in state:
            sizes.append(torch.full((), torch.nan, device=p.device))
            continue
        (beta1, beta2), steps = group["betas"], state["step"].to(p.device)
        mean = state["exp_avg"] / (1 - beta1**steps)
        spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt()
        ratio = group["lr"] * (mean / (spread + group["eps"])).norm() / p.norm()
        sizes.append(torch.where(p.norm() > 0, ratio, torch.nan).float())
    return torch.stack(sizes)


def three_digits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to 11 significant bits (0.05 %): the zeros behind them pack to half the size on disk."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values).astype(np.float32)


def _thinned(content: dict[str, Any], rows: int = ROWS) -> dict[str, Any]:
    """At most about ``rows`` steps: every k-th, those that stand out and those that were skipped."""
    count = len(content["steps"])
    if count <= rows:
        return content
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.log(content["norms"])
        usual = np.nanmedian(np.where(np.isfinite(size), size, np.nan), axis=0)
        rise = np.nan_to_num(size - usual, nan=-np.inf, neginf=-np.inf).max(axis=1)
    keep = np.zeros(count, dtype=bool)
    keep[:: -(-count // (rows // 2))] = True
    keep[np.argsort(rise)[-(rows // 4) :]] = True
    lost = np.flatnonzero(content["skipped"])
    keep[lost[:: max(1, -(-len(lost) // (rows // 4)))]] = True  # where most are skipped, some stand for all
    return content | {name: content[name][keep] for name in BY_STEP}
