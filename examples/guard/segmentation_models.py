"""A U-Net of segmentation-models-pytorch with batch norm, and an image with NaN in it.

One such image ends an ordinary training: it reaches all weights, Adam's moments and batch norm's running
statistics. The guard skips its step. Everything ends bit for bit as in a run without that batch.

    pip install segmentation-models-pytorch
    python examples/guard/segmentation_models.py
"""

import segmentation_models_pytorch as smp
import torch

from refinelib.guard import Guard, diagnose

POISONED = 3


def make_batches():
    """Images and masks; one image of one batch has a row of NaN."""
    images = torch.rand(6, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [(x, (x.mean(1, keepdim=True) > 0.5).float()) for x in images]
    batches[POISONED][0][2, :, 5] = torch.nan
    return batches


def train(batches):
    """An ordinary loop; gives the state at its end and what was found at each skipped step."""
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = torch.nn.BCEWithLogitsLoss()
    guard = Guard(model, optimizer, grad_clip=1.0)
    found = {}
    for step, (images, masks) in enumerate(batches):
        guard.zero_grad()
        guard.backward(criterion(model(images), masks))
        if guard.read(guard.step())["skipped"]:
            found[step] = diagnose(model, criterion, (images, masks))
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, found


def main():
    """Train with the bad batch and without it."""
    batches = make_batches()
    ours, found = train(batches)
    expected, _ = train(batches[:POISONED] + batches[POISONED + 1 :])
    for step, finding in found.items():
        print(f"step {step} was skipped: {finding.sentence}")
    same = map(torch.equal, ours["model"].values(), expected["model"].values())
    print("weights and statistics as without the batch:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
