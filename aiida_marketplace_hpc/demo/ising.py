"""Simulate the two-dimensional Ising model at one temperature by Wolff's cluster algorithm.

    python3 ising.py parameters.json observables.json

This file runs on the cluster as it is: it needs nothing but the standard library of Python 3.7 or later. The same
parameters give the same observables, wherever it runs. Units: the coupling and Boltzmann's constant are 1; all observables
are per site of a square lattice with periodic boundaries.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any, Callable, Sequence  # noqa: UP035 - for the Python of an old cluster.

BINS = 20
"""Successive measurements are not independent; the means of this many long bins nearly are, and give the errors."""


def simulate(parameters: dict[str, Any]) -> dict[str, Any]:
    """Run one simulation.

    :param parameters: ``temperature``; ``size``, the edge of the lattice; ``sweeps``, the number of measurements (a multiple
        of 20); ``seed``.
    :returns: the ``temperature``; ``magnetisation`` (its absolute value), ``energy``, ``heat_capacity`` and
        ``susceptibility``, each with its standard error ``…_error``; ``cluster_size``, the mean one; ``snapshot``, the last
        configuration, a text of ``+`` and ``-`` for each row.
    :raises ValueError: if ``sweeps`` is no such multiple.
    """
    temperature, size, sweeps = parameters["temperature"], parameters["size"], parameters["sweeps"]
    if sweeps < BINS or sweeps % BINS:
        raise ValueError(f"sweeps must be a multiple of {BINS}, not {sweeps}")
    sites = size * size
    # Simulations that differ only in temperature must not share their random numbers; a text as seed is hashed.
    rng = random.Random(f"{parameters['seed']} at {temperature!r}")  # noqa: S311 - physics, not secrets.
    bond = 1.0 - math.exp(-2.0 / temperature)
    neighbours = [
        (
            site - site % size + (site + 1) % size,
            (site + size) % sites,
            site - site % size + (site - 1) % size,
            (site - size) % sites,
        )
        for site in range(sites)
    ]
    spins = [1] * sites

    # The number of clusters between measurements is fixed before the first one: stopping where many sites have just been
    # flipped would favour the configurations that follow large clusters.
    sizes = [flip_cluster(spins, neighbours, bond, rng) for _ in range(200)]
    clusters = max(1, round(sites * len(sizes) / sum(sizes)))
    for _ in range(sweeps // 10 * clusters):
        flip_cluster(spins, neighbours, bond, rng)

    # Whole numbers of the whole lattice: their sums do not depend on how a version of Python adds up fractions.
    magnetisations: list[int] = []
    energies: list[int] = []
    flipped = 0
    for sweep in range(1, sweeps + 1):
        for _ in range(clusters):
            flipped += flip_cluster(spins, neighbours, bond, rng)
        bonds = sum(spins[site] * (spins[right] + spins[below]) for site, (right, below, _, _) in enumerate(neighbours))
        magnetisations.append(abs(sum(spins)))
        energies.append(-bonds)
        if sweep % (sweeps // BINS) == 0:
            sys.stdout.write(f"sweep {sweep}: magnetisation {magnetisations[-1]}, energy {energies[-1]}\n")

    rows = [spins[start : start + size] for start in range(0, sites, size)]
    observables: dict[str, Any] = {
        "temperature": temperature,
        "cluster_size": flipped / (sweeps * clusters),
        "snapshot": ["".join("+" if spin > 0 else "-" for spin in row) for row in rows],
    }
    estimates = {
        "magnetisation": jackknife(magnetisations, lambda mean, _: mean / sites),
        "energy": jackknife(energies, lambda mean, _: mean / sites),
        "susceptibility": jackknife(magnetisations, lambda _, variance: variance / sites / temperature),
        "heat_capacity": jackknife(energies, lambda _, variance: variance / sites / temperature**2),
    }
    for name, (value, error) in estimates.items():
        observables[name], observables[f"{name}_error"] = value, error
    return observables


def flip_cluster(
    spins: list[int], neighbours: Sequence[tuple[int, int, int, int]], bond: float, rng: random.Random
) -> int:
    """Flip one cluster of equal spins that are joined with the probability ``bond``, and return its size."""
    draw = rng.random
    site = int(draw() * len(spins))
    old = spins[site]
    new = -old
    spins[site] = new
    boundary = [site]
    size = 1
    while boundary:
        for neighbour in neighbours[boundary.pop()]:
            if spins[neighbour] == old and draw() < bond:
                spins[neighbour] = new
                boundary.append(neighbour)
                size += 1
    return size


def jackknife(samples: Sequence[int], estimate: Callable[[float, float], float]) -> tuple[float, float]:
    """Estimate a function of mean and variance, and its standard error from leaving out one bin after the other.

    :param samples: a multiple of :data:`BINS` of them.
    :returns: the estimate and its standard error.
    """
    length = len(samples) // BINS
    bins = [samples[start : start + length] for start in range(0, len(samples), length)]
    sums = [(sum(values), sum(value * value for value in values)) for values in bins]
    total, squares = sum(first for first, _ in sums), sum(second for _, second in sums)

    def evaluate(first: int, second: int, count: int) -> float:
        return estimate(first / count, (second * count - first * first) / count**2)

    without = [evaluate(total - first, squares - second, len(samples) - length) for first, second in sums]
    centre = math.fsum(without) / BINS
    error = math.sqrt((BINS - 1) / BINS * math.fsum((value - centre) ** 2 for value in without))
    return evaluate(total, squares, len(samples)), error


def main(source: str, target: str) -> None:
    """Read the parameters from one JSON file and write the observables to another."""
    with open(source, encoding="utf-8") as file:
        parameters = json.load(file)
    observables = simulate(parameters)
    with open(target, "w", encoding="utf-8") as file:
        json.dump(observables, file, indent=1, sort_keys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
