"""Whether two points differ by more than their repeats do: Welch's t-test, without SciPy.

The test is Welch's (1947), as it suits few values whose variances differ; so Colas, Sigaud and Oudeyer (2019, "A
hitchhiker's guide to statistical comparisons of reinforcement learning algorithms") advise for runs over seeds. Equal
seeds are not taken for pairs: the same seed in two configurations need not stand for the same chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NAME = "Welch's t-test"
_LEAST = 2
_TINY = 1e-300
_ROUNDING = 1e-14
"""Part of a value by which equal values may differ when their mean is taken."""
_TERMS = 10_000
_PRECISE = 1e-15


@dataclass(frozen=True, slots=True, kw_only=True)
class Significance:
    """The first point against the second one.

    ``p`` is two-sided and None where nothing could be tested; ``why`` then says so in words. ``t`` and ``df`` are the
    statistic and its degrees of freedom, ``n`` how many values each point has. The points were chosen for their means,
    and ``p`` is not corrected for that.
    """

    n: tuple[int, int]
    p: float | None = None
    t: float | None = None
    df: float | None = None
    why: str = ""

    @property
    def text(self) -> str:
        """``first against second: Welch's t-test, p = 0.031, n = 3 and 3``."""
        said = f"{NAME}, p = {self.p:.2g}" if self.p is not None else f"not tested, {self.why}"
        return f"first against second: {said}, n = {self.n[0]} and {self.n[1]}"


def welch(first: Sequence[float], second: Sequence[float]) -> Significance:
    """Test whether two samples have different means. All values are finite."""
    n = (len(first), len(second))
    if min(n) < _LEAST:
        return Significance(n=n, why="as it takes two values of each")
    means = [math.fsum(each) / len(each) for each in (first, second)]
    errors = [
        math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1) / len(each)
        for each, mean in zip((first, second), means, strict=True)
    ]
    total = sum(errors)
    rounding = _ROUNDING * max(map(abs, means))
    if math.sqrt(total) <= rounding:
        same = "and both are equal" if abs(means[0] - means[1]) <= rounding else "though the two differ"
        return Significance(n=n, why=f"as neither varies over its repeats, {same}")
    t = (means[0] - means[1]) / math.sqrt(total)
    shares = [error / total for error in errors]  # Welch and Satterthwaite, without squares that vanish
    df = 1 / sum(share**2 / (count - 1) for share, count in zip(shares, n, strict=True))
    return Significance(n=n, p=t_tail(t, df), t=t, df=df)


def t_tail(t: float, df: float) -> float:
    """The probability that Student's t with ``df`` degrees of freedom is farther from 0 than ``t``, on either side.

    It is I_x(df/2, 1/2) at x = df / (df + t²): Abramowitz and Stegun 26.7.1 with 26.5.2.
    """
    squared = t * t
    return incomplete_beta(df / 2, 0.5, df / (df + squared), squared / (df + squared))


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b); ``rest`` is 1 - x, which may be too small for ``x`` to tell.

    By its continued fraction (DLMF 8.17.22, https://dlmf.nist.gov/8.17.22), summed by Lentz's method.
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the other side converges at once
        return 1 - incomplete_beta(b, a, rest, x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    )
    c, d = 1.0, 1 / _away_from_0(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_0(1 + term * d)
            c = _away_from_0(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < _PRECISE:
            break
    return front * fraction / a


def _away_from_0(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
