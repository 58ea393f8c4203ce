"""The study's physics: the program for the cluster, the exact solution, table and plot."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiida_marketplace_hpc.demo import ising, onsager, presentation

SMALL = {"temperature": 2.0, "size": 16, "sweeps": 400, "seed": 1}


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return ising.simulate(SMALL)


def test_the_same_parameters_give_the_same_observables(small: dict[str, Any]) -> None:
    assert ising.simulate(SMALL) == small


@pytest.mark.parametrize("change", [{"seed": 2}, {"temperature": 2.0001}])
def test_other_parameters_draw_other_random_numbers(small: dict[str, Any], change: dict[str, float]) -> None:
    assert ising.simulate({**SMALL, **change})["snapshot"] != small["snapshot"]


def test_the_program_runs_by_itself_with_nothing_but_the_standard_library(
    small: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "in.json").write_text(json.dumps(SMALL))
    program = [sys.executable, "-I", "-S", ising.__file__]
    subprocess.run([*program, "in.json", "out.json"], cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((tmp_path / "out.json").read_text()) == small


@pytest.mark.parametrize("sweeps", [0, 10, 30])
def test_a_number_of_sweeps_that_makes_no_bins_is_refused(sweeps: int) -> None:
    with pytest.raises(ValueError, match="multiple of 20"):
        ising.simulate({**SMALL, "sweeps": sweeps})


def test_the_simulation_agrees_with_the_exact_solution(small: dict[str, Any]) -> None:
    for name, exact in (("magnetisation", onsager.magnetisation(2.0)), ("energy", onsager.energy(2.0))):
        assert 0 < small[f"{name}_error"] < 0.02
        assert abs(small[name] - exact) < 4 * small[f"{name}_error"], name


def test_the_snapshot_is_a_square_of_spins(small: dict[str, Any]) -> None:
    rows = small["snapshot"]
    assert len(rows) == SMALL["size"]
    assert all(len(row) == SMALL["size"] and set(row) <= {"+", "-"} for row in rows)


def test_the_jackknife_error_of_a_mean_is_the_standard_error_of_the_bins() -> None:
    samples = [(7 * number) % 20 for number in range(ising.BINS)]
    mean, error = ising.jackknife(samples, lambda mean, _: mean)
    assert mean == pytest.approx(9.5)
    variance = sum((value - 9.5) ** 2 for value in samples) / (len(samples) - 1)
    assert error == pytest.approx(math.sqrt(variance / len(samples)))


def test_the_exact_solution_has_its_known_values() -> None:
    critical = onsager.CRITICAL_TEMPERATURE
    assert critical == pytest.approx(2.269185, abs=1e-6)
    assert onsager.energy(critical) == pytest.approx(-math.sqrt(2))
    assert onsager.energy(0.2) == pytest.approx(-2)
    assert onsager.energy(1000.0) == pytest.approx(-2 / 1000.0, rel=1e-3)
    assert onsager.magnetisation(2.0) == pytest.approx(0.911319, abs=1e-6)
    assert onsager.magnetisation(critical) == onsager.magnetisation(5.0) == 0
    assert onsager.heat_capacity(2.2) == pytest.approx(1.4143, abs=1e-4)
    assert onsager.heat_capacity(critical - 1e-4) > 3


def test_a_scan_is_in_the_order_of_the_temperatures(small: dict[str, Any]) -> None:
    warm = ising.simulate({**SMALL, "temperature": 3.0})
    scan = presentation.scan_arrays([warm, small])
    assert list(scan["temperature"]) == [2.0, 3.0]
    assert list(scan["energy"]) == [small["energy"], warm["energy"]]
    assert list(scan["exact_magnetisation"]) == [onsager.magnetisation(2.0), 0.0]
    assert scan["snapshot"].shape == (2, 16, 16)
    assert set(scan["snapshot"].flat) == {-1, 1}


def test_the_table_has_a_line_for_each_temperature_beside_the_exact_values(small: dict[str, Any]) -> None:
    header, _, line = presentation.table(presentation.scan_arrays([small])).splitlines()
    assert header.split() == ["T", "magnetisation", "exact", "energy", "exact", "heat", "capacity", "susceptibility"]
    cells = line.split()
    assert cells[0] == "2.000"
    assert cells[1:5] == [f"{small['magnetisation']:.4f}", "±", f"{small['magnetisation_error']:.4f}", "0.9113"]
    assert cells[8] == f"{onsager.energy(2.0):.4f}"


@pytest.mark.parametrize("temperatures", [[2.0], [1.0, 2.269185314213022, 4.0]])
def test_the_plot_is_a_picture(temperatures: list[float]) -> None:
    jobs = [ising.simulate({**SMALL, "temperature": temperature, "size": 8}) for temperature in temperatures]
    assert presentation.plot(presentation.scan_arrays(jobs)).startswith(b"\x89PNG")
