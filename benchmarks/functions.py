"""Standard functions to be made as small as possible, and a stand-in for tuning a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optuna

_A = (
    (10, 3, 17, 3.5, 1.7, 8),
    (0.05, 10, 17, 0.1, 8, 14),
    (3, 3.5, 1.7, 10, 17, 8),
    (17, 8, 0.05, 10, 0.1, 14),
)
_P = (
    (0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886),
    (0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991),
    (0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650),
    (0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381),
)  # fmt: skip
_ALPHA = (1.0, 1.2, 3.0, 3.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function over a space that is written twice: as ``sweep.params``, and as Optuna's users write it."""

    name: str
    params: Mapping[str, object]
    suggest: Callable[[optuna.Trial], Mapping[str, Any]]
    evaluate: Callable[[Mapping[str, Any]], float]
    least: float


def _box(
    name: str, bounds: list[tuple[float, float]], function: Callable[[list[float]], float], least: float = 0.0
) -> Function:
    keys = [f"x{index}" for index in range(len(bounds))]

    def suggest(trial: optuna.Trial) -> Mapping[str, Any]:
        return {key: trial.suggest_float(key, *bound) for key, bound in zip(keys, bounds, strict=True)}

    def evaluate(params: Mapping[str, Any]) -> float:
        return function([params[key] for key in keys])

    params = {
        key: f"interval({float(low)}, {float(high)})" for key, (low, high) in zip(keys, bounds, strict=True)
    }
    return Function(name=name, params=params, suggest=suggest, evaluate=evaluate, least=least)


def branin(x: list[float]) -> float:
    """Three equal minima; the usual constants."""
    bowl = x[1] - 5.1 / (4 * math.pi**2) * x[0] ** 2 + 5 / math.pi * x[0] - 6
    return bowl**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x[0]) + 10


def hartmann6(x: list[float]) -> float:
    """Six minima in six dimensions."""
    total = 0.0
    for alpha, scales, centre in zip(_ALPHA, _A, _P, strict=True):
        total -= alpha * math.exp(-sum(a * (v - p) ** 2 for a, v, p in zip(scales, x, centre, strict=True)))
    return total


def rosenbrock(x: list[float]) -> float:
    """A bent valley."""
    return sum(100 * (b - a * a) ** 2 + (1 - a) ** 2 for a, b in pairwise(x))


def ackley(x: list[float]) -> float:
    """Many small minima on the way to a steep one."""
    count = len(x)
    return (
        -20 * math.exp(-0.2 * math.sqrt(sum(v * v for v in x) / count))
        - math.exp(sum(math.cos(2 * math.pi * v) for v in x) / count)
        + 20
        + math.e
    )


def levy(x: list[float]) -> float:
    """Waves along every direction."""
    w = [1 + (v - 1) / 4 for v in x]
    middle = sum((v - 1) ** 2 * (1 + 10 * math.sin(math.pi * v + 1) ** 2) for v in w[:-1])
    last = (w[-1] - 1) ** 2 * (1 + math.sin(2 * math.pi * w[-1]) ** 2)
    return math.sin(math.pi * w[0]) ** 2 + middle + last


def tuning(params: Mapping[str, Any]) -> float:
    """A smooth stand-in for a validation error: each optimizer has a best setting of its own, Adam's is the better."""
    if params["optimizer"] == "SGD":
        error = 0.10 + 0.06 * (math.log10(params["lr"]) + 1) ** 2 + 0.3 * (params["momentum"] - 0.9) ** 2
    else:
        error = 0.08 + 0.06 * (math.log10(params["lr"]) + 2.5) ** 2 + 2.0 * (params["beta1"] - 0.92) ** 2
    width = {32: 0.04, 64: 0.01, 128: 0.0, 256: 0.02}[params["width"]]
    return error + width + 0.01 * (params["layers"] - 3) ** 2 + 0.1 * (params["dropout"] - 0.2) ** 2


def _suggest_tuning(trial: optuna.Trial) -> Mapping[str, Any]:
    chosen: dict[str, Any] = {"optimizer": trial.suggest_categorical("optimizer", ["SGD", "Adam"])}
    if chosen["optimizer"] == "SGD":
        chosen["lr"] = trial.suggest_float("sgd_lr", 1e-3, 1.0, log=True)
        chosen["momentum"] = trial.suggest_float("momentum", 0.0, 0.99)
    else:
        chosen["lr"] = trial.suggest_float("adam_lr", 1e-5, 1e-1, log=True)
        chosen["beta1"] = trial.suggest_float("beta1", 0.8, 0.99)
    chosen["width"] = trial.suggest_categorical("width", [32, 64, 128, 256])
    chosen["layers"] = trial.suggest_int("layers", 1, 8)
    chosen["dropout"] = trial.suggest_float("dropout", 0.0, 0.5)
    return chosen


FUNCTIONS = (
    _box("Branin", [(-5, 10), (0, 15)], branin, 0.397887),
    _box("Hartmann, 6-D", [(0, 1)] * 6, hartmann6, -3.32237),
    _box("Rosenbrock, 5-D", [(-2.048, 2.048)] * 5, rosenbrock),
    _box("Ackley, 5-D", [(-32.768, 32.768)] * 5, ackley),
    _box("Levy, 5-D", [(-10, 10)] * 5, levy),
    Function(
        name="tuning, conditional",
        params={
            "optimizer": {
                "SGD": {"lr": "tag(log, interval(0.001, 1.0))", "momentum": "interval(0.0, 0.99)"},
                "Adam": {"lr": "tag(log, interval(0.00001, 0.1))", "beta1": "interval(0.8, 0.99)"},
            },
            "width": "choice(32, 64, 128, 256)",
            "layers": "range(1, 9)",
            "dropout": "interval(0.0, 0.5)",
        },
        suggest=_suggest_tuning,
        evaluate=tuning,
        least=0.08,
    ),
)
