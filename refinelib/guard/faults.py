"""Faults on demand: what would happen if this loss, gradient, activation or input went bad at that step?

A fault is written ``WHAT:VALUE@WHEN[:WHERE][:always]``, several with ``;`` between them::

    grad:nan@12:boundary       NaN in the gradient of the first parameter whose name starts with "boundary", at step 12
    activation:inf@3:person    Inf in the output of the module "person" at step 3
    loss:nan@5:always          every loss from step 5 on
    input:nan@5%               NaN in the crops of one step in twenty, scattered
    input:overflow@7           a huge value in the crops of step 7
    label:swap@7               every label of step 7 turned to another class
    kill@20                    SIGKILL at step 20
    file:truncated@3           the third training image is cut short (or ``missing``) when the store is built

``VALUE`` is ``nan``, ``inf``, ``overflow`` (finite, but its square is not), ``huge`` (the largest finite number, whose norm is not)
or ``spike`` (a thousand times what it was).
Steps count from 1, as in the log. This module reads them (without torch, so that a wrong one is refused at once); ``inject`` and
``data/spoilt`` plant them.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

WHATS = ("loss", "grad", "activation", "input", "label", "kill", "file")
VALUES = ("nan", "inf", "overflow", "huge", "spike")


class Fault(NamedTuple):
    """One planted fault."""

    what: str
    value: str
    step: int  # 0 where it comes by chance
    share: float  # of the steps, where it does
    where: str
    always: bool

    def due(self, step: int) -> bool:
        if self.share:  # the same steps in every run and after every resume
            # A real hash: checksums of numbers that follow on one another are a pattern, never two due in a row.
            chance = hashlib.blake2b(f"{self.what}:{self.value}:{self.where}@{step}".encode(), digest_size=4).digest()
            return int.from_bytes(chance, "big") < self.share * 2**32
        return step == self.step or (self.always and step > self.step)

    def __str__(self) -> str:
        when = f"{100 * self.share:g}%" if self.share else str(self.step)
        head = self.what + (f":{self.value}" if self.value else "")
        return f"{head}@{when}" + (f":{self.where}" if self.where else "") + (":always" if self.always else "")


def parse(text: str) -> list[Fault]:
    """The faults of a setting ``inject``.

    Raises:
        ValueError: a fault that cannot be read; the sentence shows how one is written.
    """
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = re.fullmatch(r"(\w+)(?::(\w+))?@(\d+)(\.\d+)?(%?)((?::[\w.]+)*)", part)
        what, value, whole, fraction, percent, rest = match.groups() if match else ("", None, "0", None, "", "")
        share = float(whole + (fraction or "")) / 100 if percent else 0.0
        step = 0 if percent else int(whole)
        words = [word for word in rest.split(":") if word]
        always = "always" in words
        where = [word for word in words if word != "always"]
        good = what in WHATS and len(where) <= 1 and (what == "kill") == (value is None)
        good = good and (0 < share <= 1 and not always if percent else step >= 1 and not fraction)
        allowed = {"label": ("swap",), "file": ("truncated", "missing"), "kill": (None,)}.get(what, VALUES)
        good = good and value in allowed and (what != "activation" or bool(where)) and not (what in ("kill", "file") and percent)
        if not good:
            raise ValueError(
                f"write WHAT:VALUE@WHEN[:WHERE][:always], such as grad:nan@12:boundary, activation:inf@3:person, loss:nan@5:always, "
                f"input:nan@5%, label:swap@7, file:truncated@3 or kill@20; WHAT is one of {', '.join(WHATS)}, VALUE nan, inf, overflow, huge or spike"
            )
        faults.append(Fault(what, value or "", step, share, where[0] if where else "", always))
    return faults
