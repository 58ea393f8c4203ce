"""G7: one request per poll, whatever the number of jobs; one per file; one per folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiida_marketplace_hpc.scheduler import MarketplaceHpcScheduler
from aiida_marketplace_hpc.testing.served import ServedGateway
from aiida_marketplace_hpc.transport import MarketplaceHpcTransport


@pytest.mark.parametrize("number", [1, 40])
def test_a_poll_is_one_request(
    served: ServedGateway,
    transport: MarketplaceHpcTransport,
    scheduler: MarketplaceHpcScheduler,
    home: str,
    tmp_path: Path,
    number: int,
) -> None:
    (tmp_path / "script").write_text("#!/bin/bash\n")
    jobids = []
    for index in range(number):
        transport.mkdir(f"{home}/{index}")
        transport.put(tmp_path / "script", f"{home}/{index}/run.sh")
        jobids.append(scheduler.submit_job(f"{home}/{index}", "run.sh"))
    marker = "the poll begins here"
    transport.path_exists(f"{home}/{marker}")
    before = (
        3 * number + 3
    )  # For each job mkdir, put and submit; before them getInfo and realpath, after them the marker.
    assert len(scheduler.get_jobs([str(jobid) for jobid in jobids], as_dict=True)) == number
    served.stop()
    assert [line["capability"] for line in served.requests()[before:]] == ["query"]


def test_a_folder_of_many_small_files_is_one_request_each_way(
    served: ServedGateway, transport: MarketplaceHpcTransport, home: str, tmp_path: Path
) -> None:
    (tmp_path / "tree" / "below").mkdir(parents=True)
    for number in range(100):
        (tmp_path / "tree" / "below" / str(number)).write_text(str(number))
    transport.put(tmp_path / "tree", f"{home}/tree")
    transport.get(f"{home}/tree", tmp_path / "back")
    served.stop()
    assert [line["capability"] for line in served.requests()] == ["getInfo", "query", "createDataset", "getDataset"]
    assert len(list((tmp_path / "back" / "below").iterdir())) == 100
