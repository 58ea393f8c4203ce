"""What is known exactly about the Ising model on an infinite square lattice (Onsager 1944, Yang 1952).

Units: the coupling and Boltzmann's constant are 1; everything is per site.
"""

from __future__ import annotations

import math

CRITICAL_TEMPERATURE = 2.0 / math.log(1.0 + math.sqrt(2.0))
"""About 2.269: below it the lattice is magnetic, above it is not."""


def magnetisation(temperature: float) -> float:
    """The spontaneous magnetisation; zero from the critical temperature on."""
    if temperature >= CRITICAL_TEMPERATURE:
        return 0.0
    return float((1.0 - math.sinh(2.0 / temperature) ** -4) ** 0.125)


def energy(temperature: float) -> float:
    """The internal energy."""
    coupling = 2.0 / temperature
    # Onsager's complementary modulus, which is zero at the transition; from the modulus it would drown in rounding there.
    complement = 2.0 * math.tanh(coupling) ** 2 - 1.0
    if abs(complement) < 1e-12:
        return -1.0 / math.tanh(coupling)
    integral = _complete_elliptic(abs(complement))
    return -(1.0 + 2.0 / math.pi * complement * integral) / math.tanh(coupling)


def heat_capacity(temperature: float) -> float:
    """The derivative of the energy; it diverges, slowly, at the critical temperature."""
    step = 1e-5
    return (energy(temperature + step) - energy(temperature - step)) / (2.0 * step)


def _complete_elliptic(complement: float) -> float:
    """The complete elliptic integral of the first kind, by the arithmetic-geometric mean."""
    arithmetic, geometric = 1.0, complement
    while abs(arithmetic - geometric) > 1e-14 * arithmetic:
        arithmetic, geometric = (arithmetic + geometric) / 2.0, math.sqrt(arithmetic * geometric)
    return math.pi / (2.0 * arithmetic)
