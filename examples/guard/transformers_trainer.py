"""The guard in `transformers.Trainer`: a skipped step moves neither the optimizer nor the scheduler.

The guard clips at `max_grad_norm`. fp32 and bf16: with `fp16=True` Accelerate scales the loss by itself.
Here the embedding of token 127 comes out as NaN; `diagnose` names the module and the samples.
Run: pip install transformers accelerate; python examples/guard/transformers_trainer.py
"""

import tempfile

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from refinelib.guard import Guard, diagnose


class GuardedOptimizer(AcceleratedOptimizer):
    _is_accelerate_prepared = True  # Accelerate takes it as it is,
    step_was_skipped = False  # and Trainer asks this before it steps the scheduler

    def __init__(self, model, optimizer, **options):
        super().__init__(optimizer)
        self.guard, self.batches, self.found = Guard(model, optimizer, **options), [], []

    def step(self, closure=None):
        self.step_was_skipped = self.guard.read(self.guard.step())["skipped"]
        if self.step_was_skipped:
            self.found += [diagnose(self.guard.model, None, batch) for batch in self.batches]
        self.batches = []


class GuardedTrainer(Trainer):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, GuardedOptimizer):
            clip, self.args.max_grad_norm = self.args.max_grad_norm or None, 0.0
            self.optimizer = GuardedOptimizer(self.model, optimizer, grad_clip=clip)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        guard = self.optimizer.guard
        if not self.optimizer.batches:
            guard.zero_grad()
        self.optimizer.batches.append(self._prepare_inputs(inputs))
        loss = super().training_step(model, inputs, num_items_in_batch)
        guard.total = loss if guard.total is None else guard.total + loss
        return loss


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
