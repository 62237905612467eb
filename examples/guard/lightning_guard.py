"""The guard in Lightning's automatic optimization: `Trainer(plugins=[GuardPrecision(grad_clip=1.0)])`.

The guard clips: leave `gradient_clip_val` out. A skipped step leaves schedulers of interval "step" where they
are. `reports` has a dictionary for each step. lightning_run.py trains with it.
"""

from lightning.pytorch.plugins.precision import Precision

from refinelib.guard import Guard


class GuardPrecision(Precision):  # its arguments are the guard's
    def __init__(self, **options):
        self.options, self.reports = options, []

    def connect(self, model, optimizers, lr_schedulers):
        self.guard = Guard(model, *optimizers, **self.options) if optimizers else None
        self.each_step = [config for config in lr_schedulers if config.interval == "step"]
        return model, optimizers, lr_schedulers

    def train_step_context(self):
        if self.guard.total is None:  # a step's first micro-batch; its forward pass may change buffers
            self.guard.zero_grad()
        return super().train_step_context()

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        self.guard.backward(tensor)

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        result = closure()
        self._after_closure(model, optimizer)  # calls on_before_optimizer_step
        applied = self.guard.total is not None  # it is none if training_step gave no loss
        if applied:
            self.reports.append(self.guard.read(self.guard.step()))
            applied = not self.reports[-1]["skipped"]
        for config in self.each_step:  # Lightning steps those whose interval is "step", after this
            config.interval = "step" if applied else "none"
        return result
