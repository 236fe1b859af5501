"""Activations by name, each with the derivative that `backward` uses."""

import difflib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from batchnorm.core.dtypes import Array, Namespace


class Activation(NamedTuple):
    """A named activation: its value and its derivative, both of (xp, z)."""

    value: Callable[[Namespace, Array], Array]
    derivative: Callable[[Namespace, Array], Array]


def sigmoid(xp: Namespace, z: Array) -> Array:
    """1 / (1 + exp(-z)), without overflow and with full relative accuracy in both tails."""
    positive = z >= 0
    falling = xp.exp(-xp.where(positive, z, 0.0))
    rising = xp.exp(xp.where(positive, 0.0, z))
    return xp.where(positive, 1 / (1 + falling), rising / (1 + rising))


def normal_density(xp: Namespace, z: Array) -> Array:
    """The standard normal density."""
    return xp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def normal_distribution(xp: Namespace, z: Array) -> Array:
    """The standard normal distribution function, 0.5 * erfc(-z/sqrt(2)).

    The array API has no erf. Rational approximations in three intervals of u = abs(z)/sqrt(2); the relative error
    is below 1e-15 (times 1 + 2u^2 in the tail, from the rounding of exp). 1 + erf would cancel for negative z.

    Source: W. J. Cody, Rational Chebyshev approximations for the error function, Math. Comp. 23 (1969).
    """
    u = xp.abs(z) / math.sqrt(2)
    small, large = u <= 0.46875, u > 4
    central = xp.where(small, z / math.sqrt(2), 0.0)
    middle = xp.where(small | large, 1.0, u)
    tail = xp.where(large, u, 5.0)
    square, inverse_square = central * central, 1 / (tail * tail)
    erf = central * rational(square, ERF_CENTRAL)
    erfc_middle = rational(middle, ERFC_MIDDLE)
    erfc_tail = (1 / math.sqrt(math.pi) - inverse_square * rational(inverse_square, ERFC_TAIL)) / tail
    upper = 0.5 * xp.exp(-u * u) * xp.where(large, erfc_tail, erfc_middle)
    return xp.where(small, 0.5 + 0.5 * erf, xp.where(z < 0, upper, 1 - upper))


def rational(u: Array, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    """The quotient of two polynomials, coefficients from the highest power down."""
    numerator, denominator = (polynomial(u, c) for c in coefficients)
    return numerator / denominator


def polynomial(u: Array, coefficients: tuple[float, ...]) -> Array:
    """Horner's rule, coefficients from the highest power down."""
    value = u * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * u + coefficient
    return value


# fmt: off
ERF_CENTRAL = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
ERFC_MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
     3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)
ERFC_TAIL = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
     1.60837851487422766e-2, 6.58749161529837803e-4),
    (1.0, 2.56852019228982242e0, 1.87295284992346047e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
     2.33520497626869185e-3),
)
# fmt: on


def silu_derivative(xp: Namespace, z: Array) -> Array:
    """s + z * s * (1 - s), with s = sigmoid(z)."""
    s = sigmoid(xp, z)
    return s + z * s * (1 - s)


def leaky_relu(slope: float) -> Activation:
    """max(z, 0) + slope * min(z, 0); the derivative at 0 is `slope`, as in PyTorch."""
    # `z <= 0` rather than `z > 0`, so that NaN stays NaN.
    return Activation(
        lambda xp, z: xp.where(z <= 0, slope * z, z),
        lambda xp, z: xp.where(z <= 0, slope, xp.ones_like(z)),
    )


def relu6(xp: Namespace, z: Array) -> Array:
    """min(max(z, 0), 6)."""
    return xp.where(z <= 0, 0.0, xp.where(z >= 6, 6.0, z))


def hardswish_derivative(xp: Namespace, z: Array) -> Array:
    """z / 3 + 1/2 between -3 and 3; 0 at -3 and 1 at 3, as in PyTorch."""
    return xp.where(z <= -3, 0.0, xp.where(z >= 3, xp.ones_like(z), z / 3 + 0.5))


DEFAULT_SLOPE = 0.01

#: Activations by name, in the order of the kernels' enumeration.
ACTIVATIONS = {
    "identity": Activation(lambda xp, z: z, lambda xp, z: xp.ones_like(z)),
    "relu": Activation(lambda xp, z: xp.where(z <= 0, 0.0, z), lambda xp, z: xp.where(z <= 0, 0.0, xp.ones_like(z))),
    "leaky_relu": leaky_relu(DEFAULT_SLOPE),
    "silu": Activation(lambda xp, z: z * sigmoid(xp, z), silu_derivative),
    "sigmoid": Activation(sigmoid, lambda xp, z: sigmoid(xp, z) * sigmoid(xp, -z)),
    "tanh": Activation(lambda xp, z: xp.tanh(z), lambda xp, z: 1 - xp.tanh(z) ** 2),
    "gelu": Activation(
        lambda xp, z: z * normal_distribution(xp, z),
        lambda xp, z: normal_distribution(xp, z) + z * normal_density(xp, z),
    ),
    "relu6": Activation(relu6, lambda xp, z: xp.where((z <= 0) | (z >= 6), 0.0, xp.ones_like(z))),
    "hardswish": Activation(lambda xp, z: z * relu6(xp, z + 3) / 6, hardswish_derivative),
}

#: Second names of activations, accepted wherever the first are.
ALIASES = {"swish": "silu"}


def find(name: str) -> Activation:
    """The activation called `name`.

    Raises:
        ValueError: No activation has that name, or its slope is not a finite number.
    """
    base, slope = parse(name)
    return leaky_relu(slope) if base == "leaky_relu" else ACTIVATIONS[base]


def parse(name: str) -> tuple[str, float]:
    """Parse a name such as `leaky_relu(0.2)` into first name and slope, by default 0.01 for leaky_relu, 0 for others.

    Raises:
        ValueError: No activation has that name (the message names the nearest), or its slope is not a finite number.
    """
    if match := re.fullmatch(r"leaky_relu\((.+)\)", name):
        try:
            slope = float(match[1])
        except ValueError:
            slope = math.nan
        if not math.isfinite(slope):
            raise ValueError(f"the slope of {name!r} is not a finite number; write leaky_relu(0.2)")
        return "leaky_relu", slope
    name = ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        nearest = difflib.get_close_matches(name.lower(), [*ACTIVATIONS, *ALIASES], n=1)
        hint = f"did you mean {nearest[0]!r}? Known" if nearest else "known"
        aliases = {first: f"{first} (or {second})" for second, first in ALIASES.items()}
        known = ", ".join(aliases.get(first, first) for first in ACTIVATIONS)
        raise ValueError(
            f"no activation is called {name!r}; {hint} are {known}, leaky_relu(slope), or pass any callable on "
            "the array"
        )
    return name, DEFAULT_SLOPE if name == "leaky_relu" else 0.0


def apply(xp: Namespace, z: Array, activation: str | Callable[[Array], Array] | None) -> Array:
    """The activation of z; z itself for None."""
    if activation is None:
        return z
    return find(activation).value(xp, z) if isinstance(activation, str) else activation(z)
