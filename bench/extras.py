"""Do three losses and modules that people ask for help on real data? Train with and without each, and compare.

    python bench/extras.py --data-dir ~/coco [--seeds 3] [--epochs 40] [--width 0.25] [--parallel 6]

- ``boundary_loss``: the boundary loss on the signed distance (Kervadec et al., MIDL 2019), by itself beside the
  distance loss, of which it is a part already.
- ``active_boundary_loss``: Wang et al., "Active Boundary Loss for Semantic Segmentation", AAAI 2022: the predicted
  boundary is pulled towards the true one, pixel by pixel, through the divergence of neighbours.
- ``point_refinement``: Kirillov et al., PointRend, CVPR 2020, on the mask's own grid: a small per-pixel network rewrites
  the least certain quarter of the pixels and is trained on those.

Runs and tables are those of bench/quality.py. bench/quality.md holds the outcome.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import quality
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinelib import build as building
from refinelib.build import build_loss, build_model
from refinelib.modeling.layers import Head
from refinelib.modeling.losses import MaskLoss, cross_entropy, distance_mask, targets_of
from refinelib.modeling.output import MaskOutput, hierarchical_log_probs
from refinelib.modeling.refinements import bounded

VARIANTS = ("base", "boundary_loss", "active_boundary_loss", "point_refinement")


def active_boundary_loss(log_probs: Tensor, labels: Tensor, *, share: float = 0.01, reach: float = 20.0) -> Tensor:
    """Wang et al. 2022, eq. 3-7, one cost a sample; the boundary's ``share`` of the pixels by rank, on the device."""
    distance = targets_of(labels).signed.abs().amin(dim=1)
    probs = log_probs.exp()
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]

    def moved(x: Tensor, dy: int, dx: int) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="replicate")[..., 1 + dy : x.shape[-2] + 1 + dy, 1 + dx : x.shape[-1] + 1 + dx]

    divergence = torch.stack([(probs * (log_probs - moved(log_probs.detach(), *o))).sum(1).clamp(0, 20) for o in offsets], 1)
    towards = torch.stack([moved(distance[:, None], *o)[:, 0] for o in offsets], 1).argmin(dim=1)
    strength = torch.maximum(divergence[:, offsets.index((0, 1))], divergence[:, offsets.index((1, 0))]).detach()
    count = max(1, int(share * strength[0].numel()))
    least = strength.flatten(1).topk(count, dim=1).values[:, -1]
    chosen = (strength >= least[:, None, None]) & (strength > 1e-3)
    cost = F.cross_entropy(divergence, towards, label_smoothing=0.2, reduction="none") * distance.clamp(max=reach) / reach
    return (cost * chosen).sum(dim=(-2, -1)) / chosen.sum(dim=(-2, -1)).clamp(min=1)


class WithLoss(MaskLoss):
    """The loss of a run, and one more term."""

    def __init__(self, base: MaskLoss, extra, weight: float) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(base.__dict__)
        self.extra, self.weight = extra, weight

    def forward(self, output, labels):
        total, parts = super().forward(output, labels)
        with torch.autocast(labels.device.type, enabled=False):
            return total + self.weight * self.extra(output, labels).mean(), parts


class PointRefinement(nn.Module):
    """Rewrites the least certain ``share`` of the pixels, each from its features and its mask so far."""

    def __init__(self, model: nn.Module, share: float = 0.25) -> None:
        super().__init__()
        self.model, self.share = model, share
        self.canvas, self.mask_canvas = model.canvas, model.mask_canvas
        channels = model.person_head.in_channels
        self.net = nn.Sequential(nn.Conv2d(channels + 2, channels, 1), nn.SiLU(), nn.Conv2d(channels, channels, 1), nn.SiLU(), Head(channels, 2))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, image: Tensor) -> MaskOutput:
        seen: list[Tensor] = []
        hook = self.model.target.register_forward_hook(lambda module, inputs, result: seen.append(result[0]))
        output = self.model(image)
        hook.remove()
        (features,) = seen
        probs = torch.sigmoid(output.logits.detach())
        undecided = (1 - (2 * probs - 1).abs()).amax(dim=1)
        count = int(self.share * undecided[0].numel())
        least = undecided.flatten(1).topk(count, dim=1).values[:, -1]
        chosen = (undecided >= least[:, None, None])[:, None]
        residual = bounded(self.net(torch.cat([features, probs.to(features.dtype)], dim=1)))
        self.chosen = chosen[:, 0]
        return output._replace(logits=output.logits + chosen * residual)


def patch(variant: str) -> None:
    """Have the package train the variant."""
    if variant in ("boundary_loss", "active_boundary_loss"):
        extra = {
            "boundary_loss": lambda o, y: distance_mask(hierarchical_log_probs(o.logits), targets_of(y)),
            "active_boundary_loss": lambda o, y: active_boundary_loss(hierarchical_log_probs(o.logits), y),
        }[variant]
        building.build_loss = lambda s: WithLoss(build_loss(s), extra, weight=1.0)
    if variant == "point_refinement":
        models = []

        def build(s):
            models.append(PointRefinement(build_model(s)))
            return models[-1]

        building.build_model = build
        on_points = lambda o, y: cross_entropy(hierarchical_log_probs(o.logits), y, pixel_weights=models[-1].chosen.float())  # noqa: E731
        building.build_loss = lambda s: WithLoss(build_loss(s), on_points, weight=1.0)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        patch(sys.argv[2].split(",")[0])
        quality.one(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--store-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--parallel", type=int, default=6, help="runs at a time on each GPU")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a setting of all runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A patched model has no kernels that another process could make.
        common = dict(recipe="original", data="coco", data_dir=options.data_dir, store_dir=options.store_dir, output_dir=folder, epochs=options.epochs,
                      width=options.width, batch_size=16, lr=1e-3, min_lr=1e-5, warmup_epochs=2, ema_decay=0.98, augment="full", amp="auto", compile="off") | dict(options.p)  # fmt: skip
        jobs = [(f"{v}, seed {s}", {**common, "seed": s, "run": f"{v}-{s}"}) for s in range(options.seeds) for v in options.variants]
        finished = quality.run_all(jobs, script=__file__, parallel=options.parallel)
    print("\n" + quality.table(finished, options.variants, list(range(options.seeds))))


if __name__ == "__main__":
    main()
