"""A GAN that maps images to images: two optimizers, a guard for each.

Each network runs in the other's step too, and its batch norm counts that. So each guard gets the other
network as `losses`: a skipped step restores the buffers of both. An image with NaN reaches both losses.
Run: python examples/guard/gan.py
"""

import torch
from torch import nn
from torch.nn.functional import softplus

from refinelib.guard import Guard, diagnose

POISONED = 3


def network(channels):
    first = (nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
    return nn.Sequential(*first, nn.Conv2d(16, 1, 3, padding=1))


def train(pairs):
    """An ordinary loop; gives the state at its end and what was found where either guard skipped."""
    torch.manual_seed(0)
    generator, critic = network(1), network(2)
    adam = [torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (generator, critic)]
    guard_g = Guard(generator, adam[0], grad_clip=1.0, losses=[critic])
    guard_c = Guard(critic, adam[1], grad_clip=1.0, losses=[generator])
    found = {}
    for step, (x, y) in enumerate(pairs):
        guard_c.zero_grad()
        real, fake = critic(torch.cat([x, y], 1)), critic(torch.cat([x, generator(x).detach()], 1))
        guard_c.backward(softplus(-real).mean() + softplus(fake).mean())
        report_c = guard_c.step()
        guard_g.zero_grad()
        guard_g.backward(softplus(-critic(torch.cat([x, generator(x)], 1))).mean())
        report_g = guard_g.step()
        if guard_c.read(report_c)["skipped"]:
            found["critic", step] = diagnose(critic, nn.MSELoss(), (torch.cat([x, y], 1), y))
        if guard_g.read(report_g)["skipped"]:
            found["generator", step] = diagnose(generator, nn.MSELoss(), (x, y))
    return {"generator": generator.state_dict(), "critic": critic.state_dict()}, found


def main():
    """Train with the bad pair and without it."""
    x = torch.rand(8, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs = list(zip(x, 1 - x, strict=True))
    pairs[POISONED][0][1, 0, 7, 7] = torch.nan
    ours, found = train(pairs)
    expected, _ = train(pairs[:POISONED] + pairs[POISONED + 1 :])
    print(*(f"{where} was skipped: {finding.sentence}" for where, finding in found.items()), sep="\n")
    same = (torch.equal(ours[net][k], x) for net, state in expected.items() for k, x in state.items())
    print("both networks as without the pair:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
