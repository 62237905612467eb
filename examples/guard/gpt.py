"""A small GPT-2 of transformers with AdamW: fp16 and a scaled loss on CUDA, bf16 on a CPU.

The token embedding gives NaN in one step, as a faulty kernel would. AdamW is fused: it skips on the device,
and the loop waits for no step. `diagnose` replays the step while the fault is there and names the module.
Dropout is off, as it would draw random numbers for the batch that the other run leaves out.
Run: pip install transformers; python examples/guard/gpt.py
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from refinelib.guard import Guard, diagnose

POISONED, CUDA = 4, torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.bfloat16)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 128, "n_positions": 32}
OTHERS = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}


def train(batches, poisoned=None):
    """An ordinary loop; gives the state at its end and the skipped steps with what was found."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **OTHERS)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    guard = Guard(model, optimizer, grad_clip=1.0, scaled=CUDA)
    reports, finding = [], None
    for step, tokens in enumerate(batches):
        batch = {"input_ids": tokens, "labels": tokens}
        if step == poisoned:
            hook = model.transformer.wte.register_forward_hook(lambda *call: call[-1] * torch.nan)
        guard.zero_grad()
        with torch.autocast(DEVICE, DTYPE):
            loss = model(**batch).loss
        guard.backward(loss)
        reports.append(guard.step())
        if step == poisoned:
            with torch.autocast(DEVICE, DTYPE):
                finding = diagnose(model, None, batch, scale=float(guard.state["scale"]))
            hook.remove()
    found = {step: finding for step, report in enumerate(reports) if guard.read(report)["skipped"]}
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, found


def main():
    """Train with the fault in one step, and without that batch."""
    batches = list(torch.randint(128, (9, 4, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE))
    ours, found = train(batches, POISONED)
    expected, _ = train(batches[:POISONED] + batches[POISONED + 1 :])
    print("skipped:", *(f"step {step}: {finding.sentence}" for step, finding in found.items()))
    same = map(torch.equal, ours["model"].values(), expected["model"].values())
    print("weights as without the batch:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
