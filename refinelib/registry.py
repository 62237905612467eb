"""Parts that can be added by name, also from outside the package: losses, refinements, data sets, metrics.

A part brings its settings with it as :class:`Option`. :mod:`refinelib.config` takes them into its settings,
so that a new part needs no other line in the package.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Part = TypeVar("Part")


@dataclass(frozen=True)
class Option:
    """A setting that belongs to a registered part.

    Attributes:
        name: the setting's name, as users type it.
        default: its value where a recipe does not give one; the setting has its type, a text for None.
        description: one sentence; it stands in the notebooks' parameter cell.
        limits: keyword arguments of :func:`pydantic.Field`, such as ``ge`` and ``le``; or ``choices``, the
            texts that it may have.
        role: ``run``, ``data``, ``model``, ``training`` or ``inference``; see :mod:`refinelib.config`.
    """

    name: str
    default: Any
    description: str
    limits: Mapping[str, Any] = field(default_factory=dict, hash=False)
    role: str = "training"


def limits_in_words(limits: Iterable[Any]) -> str:
    """The limits of a setting, pydantic's constraints, in words; without an equals sign (papermill).

    Example:
        >>> from annotated_types import Ge, Gt, Le, Lt
        >>> limits_in_words([Ge(1), Le(64)]), limits_in_words([Gt(0), Lt(2**31)]), limits_in_words([])
        ('1 to 64', 'above 0, below 2147483648', '')
    """
    words = {"pattern": "letters, digits, dot, dash, underscore"}
    words |= {"ge": "at least {:.10g}", "gt": "above {:.10g}", "le": "at most {:.10g}", "lt": "below {:.10g}"}
    found = {n: getattr(one, n) for one in limits for n in words if getattr(one, n, None) is not None}
    if found.keys() == {"ge", "le"}:
        return f"{found['ge']:.10g} to {found['le']:.10g}"
    return ", ".join(words[name].format(value) for name, value in found.items())


class Registry(Mapping[str, Part], Generic[Part]):
    """Parts of one kind by name, in the order in which they were added.

    Args:
        kind: what a part is called in messages.
        home: modules that add the package's own parts; they are imported when a part is first looked up.

    Example:
        >>> greetings = Registry("greeting")
        >>> greetings.add("hello", "Hello!", Option("hello_weight", 1.0, "weight of the greeting"))
        >>> greetings["hello"], [option.name for option in greetings.options()]
        ('Hello!', ['hello_weight'])
    """

    def __init__(self, kind: str, *home: str) -> None:
        self.kind, self.home = kind, home
        self._added: dict[str, tuple[Part, tuple[Option, ...]]] = {}

    @property
    def _parts(self) -> dict[str, tuple[Part, tuple[Option, ...]]]:
        for module in self.home:
            importlib.import_module(module)
        return self._added

    def add(self, name: str, part: Part, *options: Option) -> None:
        """Register ``part`` under ``name``.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._added:
            raise ValueError(f"there is a {self.kind} {name!r} already: give yours another name")
        self._added[name] = part, options

    def remove(self, name: str) -> None:
        """Forget a part (for tests, and for notebooks whose cell is run again)."""
        del self._added[name]

    def options(self, name: str | None = None) -> Iterator[Option]:
        """The settings of one part, or of all parts."""
        parts = self._parts
        for part in parts if name is None else [name]:
            yield from parts[part][1]

    def __getitem__(self, name: str) -> Part:
        parts = self._parts
        if name not in parts:
            raise KeyError(f"there is no {self.kind} {name!r}; there are {', '.join(parts)}")
        return parts[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


LOSSES: Registry[Any] = Registry("loss", "refinelib.modeling.losses")
REFINEMENTS: Registry[Any] = Registry("refinement", "refinelib.modeling.refinements")
DATASETS: Registry[Any] = Registry("data set", "refinelib.data.splits")
METRICS: Registry[Any] = Registry("metric", "refinelib.metrics.segmentation")
