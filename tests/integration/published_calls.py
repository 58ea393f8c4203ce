"""Run by the Python in which the published client is installed: makes its nine calls, and prints what it got as JSON.

usage: published_calls.py PLATFORM_URL FOLDER [classic], with the token in MP_ACCESS_TOKEN

With ``classic`` the gateway has nothing but what was published: a state says which files there are, and no more.
"""

import json
import os
import sys
import time
from pathlib import Path

import hpc_gateway_sdk

PUBLISHED = {
    "job_name": "parity",
    "ntasks_per_node": 1,
    "partition": "normal",
    "image": "docker://hello-world",
    "executable_cmd": "/hello",
}
WORK = "#!/bin/sh\ncat in.txt > out.txt\necho done >> out.txt\n"
LONG = "#!/bin/sh\nsleep 600\n"


def _has_ended(state: dict, classic: bool) -> bool:
    if classic:
        return any(file["name"] == "out.txt" and file["size"] == "15" for file in state["files"])
    return state["state"] in ("COMPLETED", "FAILED")


def main() -> None:
    platform, folder = sys.argv[1], Path(sys.argv[2])
    classic = sys.argv[3:] == ["classic"]
    # The published client has one address, which cannot be chosen. Nothing else of it is touched.
    hpc_gateway_sdk.STAGING_URL = f"{platform}/"
    app = hpc_gateway_sdk.get_app("mc", access_token=os.environ["MP_ACCESS_TOKEN"])
    got: dict[str, object] = {}

    got["heartbeat"] = app.heartbeat().json()
    got["create_user"] = json.loads(app.create_user())
    jobid = got["create_job"] = app.create_job(PUBLISHED)
    for name, content in (("job.sh", WORK), ("in.txt", "from here\n")):
        source = folder / f"local-{name}"
        source.write_text(content)
        answer = app.upload_file(jobid, name, str(source))
        got[f"upload_file {name}"] = [answer.status_code, answer.json()]
    # Without a name the part's own counts, which is the whole path here.
    got["upload_file unnamed"] = app.upload_file(jobid, None, str(source)).json()
    got["check_job_state"] = app.check_job_state(jobid)
    got["launch_job"] = app.launch_job(jobid)
    if not classic:  # There it is another job, whose files must not be those of the first one.
        got["launch_job again"] = app.launch_job(jobid)
    deadline = time.monotonic() + 60
    while not _has_ended(state := app.check_job_state(jobid), classic):
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    got["check_job_state at the end"] = state
    answer = app.download_file(jobid, "out.txt")
    got["download_file"] = [answer.status_code, answer.text]
    if classic:
        got["launch_job again"] = app.launch_job(jobid)
        while len([file for file in state["files"] if file["name"].startswith("slurm-")]) < 2:
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
            state = app.check_job_state(jobid)
    got["delete_file"] = app.delete_file(jobid, "out.txt")
    got["download_file of nothing"] = app.download_file(jobid, "out.txt").status_code

    other = app.create_job(PUBLISHED)
    source.write_text(LONG)
    app.upload_file(other, "job.sh", str(source))
    got["cancel_job too early"] = app.cancel_job(other)
    app.launch_job(other)
    got["cancel_job"] = app.cancel_job(other)
    got["create_job wrong"] = app.create_job({"job_name": "half"})
    unknown = "0" * 24
    if not classic:  # There the answer is a page, and the client fails.
        got["check_job_state unknown"] = app.check_job_state(unknown)
        got["delete_file unknown"] = app.delete_file(unknown, "x")
    try:
        app.launch_job(unknown)
    except RuntimeError as exc:
        got["launch_job unknown"] = str(exc)
    try:
        hpc_gateway_sdk.get_app("mc", access_token="wrong")
    except RuntimeError as exc:
        got["get_app wrong token"] = str(exc)
    json.dump(got, sys.stdout)


if __name__ == "__main__":
    main()
