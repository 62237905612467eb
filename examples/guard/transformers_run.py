"""`transformers.Trainer` with transformers_trainer.py: the embedding of token 127 comes out as NaN.

`diagnose` names the module and the samples.
Run: pip install transformers accelerate; python examples/guard/transformers_run.py
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers_trainer import GuardedTrainer


def train(samples, accumulate):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 16, "vocab_size": 128}
    others = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **others))
    model.transformer.wte.register_forward_hook(
        lambda module, args, out: out.masked_fill((args[0] == 127)[..., None], torch.nan)
    )
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 20, "num_train_epochs": 1}
    options = {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none"}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **schedule, **options, **sizes, disable_tqdm=True)
        trainer = GuardedTrainer(model, arguments, train_dataset=samples)
        trainer.train()
    parts = {"model": model, "optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler}
    return {name: part.state_dict() for name, part in parts.items()}, trainer.optimizer.found


def main(accumulate=2, poisoned=9):
    """Train with the bad sample, and without the samples of its step."""
    tokens = torch.randint(127, (24, 16), generator=torch.Generator().manual_seed(0))
    tokens[poisoned, 3] = 127
    samples, size = [{"input_ids": x, "labels": x} for x in tokens], 2 * accumulate
    first = poisoned // size * size
    ours, found = train(samples, accumulate)
    expected, _ = train(samples[:first] + samples[first + size :], accumulate)
    print("of the skipped step's micro-batches:", *(f"{finding.sentence}." for finding in found))
    same = map(torch.equal, ours["model"].values(), expected["model"].values())
    print("weights as without the step:", all(same))
    return ours, expected, found


if __name__ == "__main__":
    main()
