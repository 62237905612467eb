"""Parts that can be added by name from outside the package: losses, refinements, data sets, metrics.

A part brings its settings with it as :class:`Option`. :mod:`refinelib.config` accepts these beside its
own fields, so that a new part needs no other line in the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Option:
    """A setting that belongs to a registered part.

    Attributes:
        name: the setting's name, as users type it.
        default: its value where a recipe does not give one; its type is the setting's type.
        description: one sentence; it stands in the notebooks' parameter cell.
        limits: keyword arguments of :func:`pydantic.Field`, such as ``ge`` and ``le``.
        role: as for the fields of :class:`refinelib.config.Settings`.
    """

    name: str
    default: Any
    description: str
    limits: Mapping[str, Any] = field(default_factory=dict)
    role: str = "training"


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts of one kind by name, in the order in which they were added.

    Example:
        >>> greetings = Registry("greeting")
        >>> greetings.add("hello", "Hello!", Option("hello_weight", 1.0, "weight of the greeting"))
        >>> greetings["hello"], [option.name for option in greetings.options()]
        ('Hello!', ['hello_weight'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, tuple[Part, tuple[Option, ...]]] = {}

    def add(self, name: str, part: Part, *options: Option) -> None:
        """Register ``part`` under ``name``.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._parts:
            raise ValueError(f"there is a {self.kind} {name!r} already: give yours another name")
        self._parts[name] = part, options

    def remove(self, name: str) -> None:
        """Forget a part (for tests, and for notebooks whose cell is run again)."""
        del self._parts[name]

    def options(self) -> Iterator[Option]:
        """The settings of all parts."""
        for _, options in self._parts.values():
            yield from options

    def __getitem__(self, name: str) -> Part:
        if name not in self._parts:
            raise KeyError(f"there is no {self.kind} {name!r}; there are {', '.join(self._parts)}")
        return self._parts[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


LOSSES: Registry[Any] = Registry("loss")
REFINEMENTS: Registry[Any] = Registry("refinement")
DATASETS: Registry[Any] = Registry("data set")
METRICS: Registry[Any] = Registry("metric")


def load_builtin() -> None:
    """Import the modules that register the package's own parts."""
    for name in ("modeling.losses", "modeling.refinements", "data.splits", "metrics.segmentation"):
        importlib.import_module(f"refinelib.{name}")
