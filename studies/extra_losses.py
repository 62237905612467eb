"""Losses and a module that people ask for, registered from outside the package: do they help on real data?

    python studies/extra_losses.py --data-dir ~/coco [--seeds 3] [--epochs 40] [--width 0.25]

- ``boundary_loss``: the boundary loss on the signed distance (Kervadec et al., MIDL 2019), by itself beside
  the distance loss, of which it is a part already.
- ``active_boundary_loss``: Wang et al., "Active Boundary Loss for Semantic Segmentation", AAAI 2022: the
  predicted boundary is pulled towards the true one, pixel by pixel, through the divergence of neighbours.
- ``point_refinement``: Kirillov et al., PointRend, CVPR 2020, on the mask's own grid: a small per-pixel
  network
  rewrites the least certain quarter of the pixels and is trained on those.

Runs and tables are those of bench/quality.py. bench/quality.md holds the outcome.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # as PyTorch's documentation writes it
from torch import Tensor, nn

from refinelib.__main__ import main as refinelib
from refinelib.modeling.layers import Head
from refinelib.modeling.losses import LossTerm, cross_entropy, distance_mask
from refinelib.modeling.refinements import Refinement, bounded
from refinelib.registry import LOSSES, REFINEMENTS, Option

#: Settings of each variant.
VARIANTS = {
    "base": {},
    "boundary_loss": {"boundary_loss_weight": 1.0},
    "active_boundary_loss": {"active_boundary_loss_weight": 1.0},
    "point_refinement": {"use_point_refinement": True, "points_weight": 1.0},
}
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def active_boundary_loss(
    log_probs: Tensor, distance: Tensor, *, share: float = 0.01, reach: float = 20.0
) -> Tensor:
    """Wang et al. 2022, eq. 3-7: float32 ``[B]``.

    Args:
        log_probs: float32 ``[B, 3, H, W]``.
        distance: float32 ``[B, H, W]`` to the nearest true outline, pixels.
        share: of the pixels that count as the predicted boundary, those where neighbours diverge most.
        reach: distance in pixels from which on the weight of a pixel is 1.
    """
    padded = F.pad(log_probs.detach(), (1, 1, 1, 1), mode="replicate")
    around = F.pad(distance[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    height, width = distance.shape[-2:]
    divergences, distances = [], []
    for dy, dx in NEIGHBOURS:
        rows, columns = slice(1 + dy, 1 + dy + height), slice(1 + dx, 1 + dx + width)
        moved = log_probs.exp() * (log_probs - padded[..., rows, columns])
        divergences.append(moved.sum(1).clamp(0, 20))
        distances.append(around[..., rows, columns])
    divergence = torch.stack(divergences, 1)
    towards = torch.stack(distances, 1).argmin(dim=1)
    right, below = (divergence[:, NEIGHBOURS.index(one)] for one in ((0, 1), (1, 0)))
    strength = torch.maximum(right, below).detach()
    count = max(1, int(share * height * width))
    least = strength.flatten(1).topk(count, dim=1).values[:, -1]
    chosen = (strength >= least[:, None, None]) & (strength > 1e-3)
    cost = F.cross_entropy(divergence, towards, label_smoothing=0.2, reduction="none")
    cost = cost * distance.clamp(max=reach) / reach
    return (cost * chosen).sum(dim=(-2, -1)) / chosen.sum(dim=(-2, -1)).clamp(min=1)


class PointRefinement(nn.Module):
    """Rewrites the least certain ``share`` of the pixels, each from its features and its mask so far.

    Returns new logits, and as the head ``points`` which pixels these are, float32 ``[B, H, W]``.
    """

    def __init__(self, channels: int, *, share: float = 0.25) -> None:
        super().__init__()
        self.share = share
        first, second = nn.Conv2d(channels + 2, channels, 1), nn.Conv2d(channels, channels, 1)
        self.net = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), Head(channels, 2))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rewrite logits float32 ``[B, 2, H, W]`` from features ``[B, channels, H, W]``."""
        probs = torch.sigmoid(logits.detach())
        undecided = (1 - (2 * probs - 1).abs()).amax(dim=1)
        least = undecided.flatten(1).topk(int(self.share * undecided[0].numel()), dim=1).values[:, -1]
        chosen = (undecided >= least[:, None, None]).float()
        residual = bounded(self.net(torch.cat([features, probs.to(features.dtype)], dim=1)))
        return logits + chosen[:, None] * residual, chosen


def register() -> None:
    """Add the three to the registries; all are off by default."""
    LOSSES.add(
        "boundary_loss",
        LossTerm(lambda prediction, targets: distance_mask(prediction.log_probs, targets), capped=False),
        Option("boundary_loss_weight", 0.0, "weight of the boundary loss of Kervadec et al."),
    )
    LOSSES.add(
        "active_boundary_loss",
        LossTerm(
            lambda prediction, targets: active_boundary_loss(
                prediction.log_probs, targets.signed.abs().amin(dim=1)
            ),
            capped=False,
        ),
        Option("active_boundary_loss_weight", 0.0, "weight of the active boundary loss"),
    )
    REFINEMENTS.add(
        "point_refinement",
        Refinement(PointRefinement, "use_point_refinement", "points", takes=(), head="points"),
        Option("use_point_refinement", False, "rewrite the least certain pixels", role="model"),
    )
    LOSSES.add(
        "points",
        LossTerm(
            lambda prediction, targets: cross_entropy(
                prediction.log_probs, targets.labels, pixel_weights=prediction.output.points
            ),
            capped=False,
            requires="points",
        ),
        Option("points_weight", 0.0, "weight of the cross-entropy of the rewritten pixels"),
    )


def main() -> None:
    """Train every variant over seeds and print the tables."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    import quality

    register()
    if sys.argv[1:2] == ["train"]:  # one run of the batch below
        sys.exit(refinelib(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--store-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--parallel", type=int, default=6, help="runs at a time on each GPU")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    setting = {"metavar": ("NAME", "VALUE"), "help": "a setting of all runs"}
    parser.add_argument("-p", nargs=2, action="append", default=[], **setting)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = {
            "data": "coco",
            "data_dir": options.data_dir,
            "store_dir": options.store_dir,
            "output_dir": folder,
        }
        size = {"epochs": options.epochs, "width": options.width, "batch_size": 16, "augment": "full"}
        rate = {
            "lr": 1e-3,
            "min_lr": 1e-5,
            "warmup_epochs": 2,
            "ema_decay": 0.98,
            "amp": "auto",
            "compile": "off",
        }
        common = {"recipe": "original", **where, **size, **rate, **dict(options.p)}
        jobs = [
            quality.job(variant, seed, {**common, **VARIANTS[variant]})
            for seed in range(options.seeds)
            for variant in options.variants
        ]
        finished = quality.run_all(jobs, parallel=options.parallel, command=[sys.executable, __file__])
    print("\n" + quality.table(finished, options.variants, list(range(options.seeds))))


if __name__ == "__main__":
    main()
