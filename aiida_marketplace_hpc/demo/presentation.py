"""How the result of the scan is shown: a table and a plot, both beside the exact solution."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiida_marketplace_hpc.demo import onsager

MEASURED = ("magnetisation", "energy", "heat_capacity", "susceptibility")
"""The observables that have a standard error beside them."""

_RESOLUTION = 120


def scan_arrays(jobs: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Put the observables of all temperatures together, in the order of the temperatures.

    :param jobs: what :func:`aiida_marketplace_hpc.demo.ising.simulate` returned for each.
    :returns: one-dimensional arrays ``temperature``, each of :data:`MEASURED` with its ``…_error``, ``exact_magnetisation``
        and ``exact_energy``; and ``snapshot``, the last configurations (temperature, row, column), ±1.
    """
    ordered = sorted(jobs, key=lambda job: float(job["temperature"]))
    names = ["temperature", *MEASURED, *(f"{name}_error" for name in MEASURED)]
    arrays: dict[str, NDArray[Any]] = {name: np.array([float(job[name]) for job in ordered]) for name in names}
    temperatures = [float(value) for value in arrays["temperature"]]
    arrays["exact_magnetisation"] = np.array([onsager.magnetisation(value) for value in temperatures])
    arrays["exact_energy"] = np.array([onsager.energy(value) for value in temperatures])
    arrays["snapshot"] = np.array(
        [[[1 if site == "+" else -1 for site in row] for row in job["snapshot"]] for job in ordered], dtype=np.int8
    )
    return arrays


def table(scan: Mapping[str, NDArray[Any]]) -> str:
    """Lay out a scan as a text table.

    :param scan: as of :func:`scan_arrays`.
    """
    from tabulate import tabulate

    def measured(name: str, row: int, digits: int) -> str:
        return f"{scan[name][row]:.{digits}f} ± {scan[f'{name}_error'][row]:.{digits}f}"

    rows = [
        [
            f"{temperature:.3f}",
            measured("magnetisation", row, 4),
            f"{scan['exact_magnetisation'][row]:.4f}",
            measured("energy", row, 4),
            f"{scan['exact_energy'][row]:.4f}",
            measured("heat_capacity", row, 2),
            measured("susceptibility", row, 2),
        ]
        for row, temperature in enumerate(scan["temperature"])
    ]
    headers = ["T", "magnetisation", "exact", "energy", "exact", "heat capacity", "susceptibility"]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, stralign="right")


def plot(scan: Mapping[str, NDArray[Any]]) -> bytes:
    """Draw a scan beside the exact solution, with three of its configurations.

    :param scan: as of :func:`scan_arrays`.
    :returns: a PNG picture.
    """
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.figure import Figure

    critical = onsager.CRITICAL_TEMPERATURE
    temperatures = scan["temperature"]
    margin = 0.1 * float(temperatures[-1] - temperatures[0]) or 0.5
    # The heat capacity diverges at the critical temperature; a grid that misses it draws a finite peak.
    fine = np.linspace(float(temperatures[0]) - margin, float(temperatures[-1]) + margin, 400)
    fine = fine[(fine > 0.2) & (abs(fine - critical) > 1e-3)]

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=[3, 2])
    left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    for axes, name, exact, label in (
        (left, "magnetisation", onsager.magnetisation, "magnetisation per site"),
        (right, "heat_capacity", onsager.heat_capacity, "heat capacity per site"),
    ):
        axes.axvline(critical, color="0.7", linestyle=":", label=f"transition, T = {critical:.3f}")
        axes.plot(fine, [exact(float(value)) for value in fine], color="C0", label="exact, infinite lattice")
        axes.errorbar(
            temperatures, scan[name], yerr=scan[f"{name}_error"], fmt="o", color="C3", capsize=3, label="this study"
        )
        axes.set_xlabel("temperature T")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()
    size = scan["snapshot"].shape[-1]
    figure.suptitle(f"Ising model on {size} × {size} sites, one job on the cluster for each point")

    nearest = int(abs(temperatures - critical).argmin())
    for column, index in enumerate((0, nearest, len(temperatures) - 1)):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        axes.imshow(scan["snapshot"][index], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"T = {temperatures[index]:.2f}")
        axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_RESOLUTION)
    return picture.getvalue()
