"""Faults on demand: what would happen if this loss, gradient, activation or input went bad at that step?

A fault is written ``WHAT:VALUE@STEP[:WHERE][:always]``, several with ``;`` between them::

    grad:nan@12:boundary       NaN in the gradient of the first parameter whose name starts with "boundary", at step 12
    activation:inf@3:person    Inf in the output of the module "person" at step 3
    loss:nan@5:always          every loss from step 5 on
    input:overflow@7           a huge value in the crops of step 7
    label:swap@7               every label of step 7 turned to another class
    kill@20                    SIGKILL at step 20

``VALUE`` is ``nan``, ``inf``, ``overflow`` (finite, but its square is not) or ``spike`` (a thousand times what it was).
Steps count from 1, as in the log. This module reads them (without torch, so that a wrong one is refused at once); ``inject`` plants them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WHATS = ("loss", "grad", "activation", "input", "label", "kill")
VALUES = ("nan", "inf", "overflow", "spike")


class Fault(NamedTuple):
    """One planted fault."""

    what: str
    value: str
    step: int
    where: str
    always: bool

    def due(self, step: int) -> bool:
        return step == self.step or (self.always and step > self.step)


def parse(text: str) -> list[Fault]:
    """The faults of a setting ``inject``.

    Raises:
        ValueError: a fault that cannot be read; the sentence shows how one is written.
    """
    faults = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = re.fullmatch(r"(\w+)(?::(\w+))?@(\d+)((?::[\w.]+)*)", part)
        what, value, step, rest = match.groups() if match else ("", None, "0", "")
        words = [word for word in rest.split(":") if word]
        always = "always" in words
        where = [word for word in words if word != "always"]
        good = what in WHATS and int(step) >= 1 and len(where) <= 1 and (what == "kill") == (value is None)
        good = good and (value is None or (value == "swap" if what == "label" else value in VALUES))
        good = good and (what != "activation" or where)
        if not good:
            raise ValueError(
                f"write WHAT:VALUE@STEP[:WHERE][:always], such as grad:nan@12:boundary, activation:inf@3:person, "
                f"loss:nan@5:always, input:spike@7, label:swap@7 or kill@20; WHAT is one of {', '.join(WHATS)}, VALUE nan, inf, overflow or spike"
            )
        faults.append(Fault(what, value or "", int(step), where[0] if where else "", always))
    return faults
