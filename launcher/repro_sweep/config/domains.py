"""What a search may choose for one key: from a parsed override to a domain, and from a choice to its value.

Ranges mean what they mean in Hydra: ``range`` excludes its end, ``interval`` includes both of its ends. The values of
a range with float steps are Hydra's own, so that a search and a grid run the same points; its domain holds them as
decimal arithmetic has them (0.3 where Hydra's sums are 0.30000000000000004), as Optuna takes no others. Nothing here
may know the tree that a space is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from random import Random

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep

from repro_sweep.config.grammar import Grammar, Term, token
from repro_sweep.errors import SpaceError
from repro_sweep.points import Categorical, Domain, FloatRange, IntRange, Scalar

MAX_INTEGER = 2**53
"""Optuna computes with floats, which hold all integers up to here."""

_TAGS = ("int", "log")
_STEP_TOLERANCE = 1e-6
"""How far from a step a number may be, in steps, besides what the last digits of the range's ends make out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The values of a key where they are a range of at least two.

    ``text`` is the range as given. ``terms`` lists its values as a grid has them, and raises a SpaceError if it is an
    interval. ``steps`` are the values of a range with float steps, as Hydra has them, ascending.
    """

    domain: IntRange | FloatRange
    text: str
    terms: Callable[[], tuple[Term, ...]]
    steps: tuple[float, ...] = ()

    def take(self, value: object) -> int | float | None:
        """The value that the point gets where ``value`` is chosen; None if it is not in the range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        if self.steps:
            index = self._index(value)
            return None if index is None else self.steps[index]
        domain = self.domain
        if not domain.low <= value <= domain.high:
            return None
        if isinstance(domain, FloatRange):
            return float(value)
        return int(value) if (value - domain.low) % domain.step == 0 else None

    def chosen(self, value: object) -> int | float | None:
        """The number in the domain for which :meth:`take` gives ``value``; None if it is not in the range."""
        taken = self.take(value)
        if taken is None or not self.steps:
            return taken
        index = self._index(taken)
        assert index is not None
        assert isinstance(self.domain, FloatRange)
        assert self.domain.step is not None
        return min(_decimal(self.domain.low, index, self.domain.step), self.domain.high)

    def _index(self, value: float) -> int | None:
        assert isinstance(self.domain, FloatRange)
        assert self.domain.step is not None
        steps = (value - self.domain.low) / self.domain.step
        if not -1 < steps < len(self.steps):
            return None
        index = min(round(steps), len(self.steps) - 1)
        digits = 4 * math.ulp(max(abs(self.domain.low), abs(self.domain.high))) / self.domain.step
        return index if abs(steps - index) <= _STEP_TOLERANCE + digits else None


def read(grammar: Grammar, override: Override, where: str) -> Span | tuple[Term, ...]:
    """The values of a parsed override for a search: a range, or one or several choices.

    Raises:
        SpaceError: there is no value, too many, an unknown tag, or a range that cannot be searched.
    """
    sweep = override._value
    if isinstance(sweep, Sweep):
        _check_tags(override, sweep, where)
        if isinstance(sweep, IntervalSweep):
            return _interval(grammar, override, sweep, where)
        if isinstance(sweep, RangeSweep) and not sweep.shuffle:
            return _range(grammar, override, sweep, where)
    return grammar.terms(override, where)


def distinct(values: Sequence[object], where: str) -> tuple[int, ...]:
    """The places of the first of each of these choices; what stands twice is one choice.

    Raises:
        SpaceError: a value is none that a sampler can choose, or equal to another one though it is not the same.
    """
    first: dict[object, int] = {}
    for index, value in enumerate(values):
        if (value is not None and not isinstance(value, (str, int, float))) or value != value:
            raise SpaceError(
                f"{where}: a search chooses among strings, numbers, true, false and null, got {value!r}"
            )
        other = values[first.setdefault(value, index)]
        if repr(other) != repr(value):
            raise SpaceError(
                f"{where}: a search cannot tell the choices {other!r} and {value!r} apart; keep one of them"
            )
    return tuple(first.values())


def find(values: Sequence[object], value: object) -> int | None:
    """The place of ``value`` among these choices, numbers being compared by value."""
    wanted = token(value)
    return next((index for index, other in enumerate(values) if token(other) == wanted), None)


def ends(domain: Domain) -> tuple[Scalar, ...]:
    """All choices, or both ends of a range."""
    return domain.choices if isinstance(domain, Categorical) else (domain.low, domain.high)


def sample(domain: Domain, dice: Random) -> Scalar:
    """Some choice, or some value of a range, which is often one of its ends."""
    if isinstance(domain, Categorical):
        return dice.choice(domain.choices)
    if domain.step is None:
        inner = min(dice.uniform(domain.low, domain.high), domain.high)
    else:
        steps = dice.randint(0, round((domain.high - domain.low) / domain.step))
        inner = min(domain.low + steps * domain.step, domain.high)
    return dice.choice((domain.low, domain.high, inner))


def describe(domain: Domain) -> str:
    """What is allowed, for messages."""
    if isinstance(domain, Categorical):
        return ", ".join("null" if choice is None else str(choice) for choice in domain.choices)
    steps = f" in steps of {domain.step}" if domain.step not in (None, 1) else ""
    kind = "an integer " if isinstance(domain, IntRange) else ""
    return f"{kind}from {domain.low} to {domain.high}{steps}"


def _check_tags(override: Override, sweep: Sweep, where: str) -> None:
    for tag in sorted(sweep.tags):
        if tag not in _TAGS:
            raise SpaceError(
                f"{where}: {tag!r} is no tag of a search (log, int), got {override.get_value_string()}"
            )
    shuffled = isinstance(sweep, RangeSweep) and sweep.shuffle
    if sweep.tags and (shuffled or not isinstance(sweep, (IntervalSweep, RangeSweep))):
        raise SpaceError(
            f"{where}: the tags log and int go with interval(…) and range(…), got {override.get_value_string()}"
        )


def _interval(
    grammar: Grammar, override: Override, sweep: IntervalSweep, where: str
) -> Span | tuple[Term, ...]:
    text, low, high = override.get_value_string(), sweep.start, sweep.end
    assert low is not None
    assert high is not None
    _check_finite((low, high), where, text)
    if low > high:
        raise SpaceError(f"{where}: an interval must begin at its lower end, got {text}")
    log = "log" in sweep.tags
    domain: IntRange | FloatRange
    if "int" in sweep.tags or isinstance(low, int):  # Hydra's int(interval(…)) makes its ends integers
        domain = IntRange(low=_whole(low, where, text), high=_whole(high, where, text), log=log)
    else:
        domain = FloatRange(low=low, high=high, log=log)
    return _checked(domain, where, text, partial(grammar.terms, override, where))


def _range(grammar: Grammar, override: Override, sweep: RangeSweep, where: str) -> Span | tuple[Term, ...]:
    text, terms = override.get_value_string(), partial(grammar.terms, override, where)
    given = (sweep.start, sweep.stop, sweep.step)
    ends_and_step = tuple(number for number in given if number is not None)
    _check_finite(ends_and_step, where, text)
    start, stop, step = ends_and_step
    if step == 0:
        return terms()  # which is an error
    if "int" in sweep.tags:
        start, stop, step = (_whole(number, where, text) for number in ends_and_step)
    log = "log" in sweep.tags
    integers = isinstance(start, int) and isinstance(stop, int) and isinstance(step, int)
    if log and (not integers or step != 1):
        raise SpaceError(
            f"{where}: a logarithmic range has no steps: use integers in steps of 1, or tag(log, interval(…)); "
            f"got {text}"
        )
    if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
        values = range(start, stop, step)
        if not values:
            raise SpaceError(f"{where}: {text!r} has no values")
        low, high = sorted((values[0], values[-1]))
        return _checked(IntRange(low=low, high=high, log=log, step=abs(step)), where, text, terms)
    steps = tuple(sorted(term.value for term in terms() if isinstance(term.value, float)))
    first, last = sorted((float(start), _decimal(start, len(steps) - 1, step)))
    return _checked(FloatRange(low=first, high=last, step=abs(float(step))), where, text, terms, steps)


def _checked(
    domain: IntRange | FloatRange,
    where: str,
    text: str,
    terms: Callable[[], tuple[Term, ...]],
    steps: tuple[float, ...] = (),
) -> Span | tuple[Term, ...]:
    """The range, or its value if it has only one."""
    if isinstance(domain, IntRange) and max(abs(domain.low), abs(domain.high)) > MAX_INTEGER:
        raise SpaceError(
            f"{where}: a range of integers must lie between -{MAX_INTEGER} and {MAX_INTEGER}, got {text}"
        )
    if domain.log and domain.low <= 0:
        raise SpaceError(f"{where}: a logarithmic range must begin above 0, got {text}")
    if not math.isfinite(domain.high - domain.low):
        raise SpaceError(f"{where}: a range must not be wider than the largest 64-bit float, got {text}")
    if domain.low == domain.high:
        return (Term(str(domain.low), domain.low),)
    return Span(domain=domain, text=text, terms=terms, steps=steps)


def _check_finite(numbers: Sequence[float], where: str, text: str) -> None:
    for number in numbers:
        try:
            finite = math.isfinite(number)
        except OverflowError:  # an integer beyond the floats
            finite = False
        if not finite:
            raise SpaceError(f"{where}: the ends of a range must be finite 64-bit numbers, got {text}")


def _whole(number: float, where: str, text: str) -> int:
    if number != int(number):
        raise SpaceError(f"{where}: a range of integers must have integers as its ends and step, got {text}")
    return int(number)


def _decimal(start: float, steps: int, step: float) -> float:
    """``start + steps * step`` in decimal arithmetic."""
    return float(Decimal(repr(float(start))) + steps * Decimal(repr(float(step))))
