"""The guard in `transformers.Trainer`: a skipped step moves neither the optimizer nor the scheduler.

The guard clips at `max_grad_norm`. fp32 and bf16: with `fp16=True` Accelerate scales the loss by itself.
`found` has a finding for each micro-batch of a skipped step. transformers_run.py trains with it.
"""

from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer

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
