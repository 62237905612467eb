"""A classifier of timm with SGD, momentum and OneCycleLR, and an image whose pixels are far too large.

The guard steps the scheduler itself, after each step that was applied: a skipped step moves neither the
weights nor the learning rate. `diagnose` names the layer whose output overflows.

    pip install timm
    python examples/guard/timm_classifier.py
"""

import timm
import torch

from refinelib.guard import Guard, diagnose

POISONED, STEPS = 4, 8


def make_batches():
    """Images and labels; one image of one batch holds 3e38, which is finite."""
    images = torch.rand(STEPS + 1, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [(x, x.mean((1, 2, 3)).mul(1e3).long() % 10) for x in images]
    batches[POISONED][0][5] = 3e38
    return batches


def train(batches):
    """An ordinary loop; gives the state at its end and what was found at each skipped step."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)
    guard = Guard(model, optimizer, schedule=scheduler, grad_clip=1.0)
    found = {}
    for step, (images, labels) in enumerate(batches):
        guard.zero_grad()
        guard.backward(criterion(model(images), labels))
        if guard.read(guard.step())["skipped"]:
            found[step] = diagnose(model, criterion, (images, labels))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return {name: part.state_dict() for name, part in parts.items()}, found


def main():
    """Train with the bad batch and without it."""
    batches = make_batches()
    ours, found = train(batches)
    expected, _ = train(batches[:POISONED] + batches[POISONED + 1 :])
    for step, finding in found.items():
        print(f"step {step} was skipped: {finding.sentence}")
    same = map(torch.equal, ours["model"].values(), expected["model"].values())
    print("weights as without the batch:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
