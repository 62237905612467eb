"""Lightning with lightning_guard.py: sqrt(0) makes a gradient NaN though the loss is finite.

The report names the layer below it. With gradient accumulation a step is skipped whole.
Run: pip install lightning; python examples/guard/lightning_run.py
"""

import lightning.pytorch as pl
import torch
from lightning_guard import GuardPrecision
from torch import nn


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(8, 16, bias=False)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        lengths = self.encoder(batch[0]).square().sqrt()
        return nn.functional.mse_loss(self.head(lengths), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def train(batches, accumulate):
    torch.manual_seed(0)
    model, precision = Net(), GuardPrecision(grad_clip=1.0)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=accumulate, plugins=[precision], **off)
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    parts = {"model": model, "optimizer": optimizer, "scheduler": config.scheduler}
    return {name: part.state_dict() for name, part in parts.items()}, precision.reports


def main(accumulate=1, poisoned=4):
    """Train with the bad batch, and without the batches of its step."""
    x = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(0))
    x[poisoned, 2] = 0
    batches, first = list(zip(x, x.sum(2, keepdim=True), strict=True)), poisoned // accumulate * accumulate
    ours, reports = train(batches, accumulate)
    expected, _ = train(batches[:first] + batches[first + accumulate :], accumulate)
    found = {step: report["parameters"] for step, report in enumerate(reports) if report["skipped"]}
    print("skipped, with the parameters whose gradient is not finite:", found)
    same = map(torch.equal, ours["model"].values(), expected["model"].values())
    print("weights as without the step:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
