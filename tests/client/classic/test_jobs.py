"""Jobs on a classic gateway: what is launched, and when a job counts as ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aiida_marketplace_hpc.client.classic import jobs as jobs_module
from aiida_marketplace_hpc.client.classic.journal import FolderState
from aiida_marketplace_hpc.errors import (
    Conflict,
    ConnectionFailed,
    MarketplaceHpcError,
    NotFound,
    NotSupported,
    Phase,
    SubmissionRefused,
    Unauthorized,
    Unavailable,
)
from tests.client.classic.scripted import WORK, Site, failed

BEAT = 30.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.jobs.close()


def _raise(error: MarketplaceHpcError) -> Callable[[str], None]:
    def launch(_: str) -> None:
        raise error

    return launch


def _with(error: MarketplaceHpcError, status: int | None = None, phase: Phase | None = None) -> MarketplaceHpcError:
    if phase is not None:
        error.phase = phase
    if status is not None:
        error.http_status = status  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed("lost", phase=Phase.MAYBE_SENT),
        _with(Unavailable("a proxy's page"), 504, Phase.MAYBE_SENT),
        _with(Unavailable("no JSON"), None, Phase.MAYBE_SENT),
        failed(500),
    ],
)
def test_a_launch_in_doubt_is_never_sent_again(site: Site, error: MarketplaceHpcError) -> None:
    site.gateway.on_launch = _raise(error)
    jobid = site.submit()
    assert "lost" in site.state(jobid)["message"]
    assert site.state(jobid)["state"] == "QUEUED"
    site.gateway.on_launch = lambda jobid: None
    assert site.submit() == jobid
    site.jobs = site.new_jobs()
    assert site.submit() == jobid
    assert site.gateway.launches == [jobid]
    # What it was shows when it begins.
    site.records(jobid, mphpc_lock=0, mphpc_started_7=0, mphpc_beat_30=1)
    assert site.state(jobid)["state"] == "RUNNING"
    assert site.state(jobid)["scheduler_id"] == "7"
    folder = site.gateway.journal.folder(WORK)
    assert folder is not None
    assert folder.state is FolderState.LAUNCHED


def test_a_launch_that_a_killed_process_has_sent_is_not_sent_again(site: Site) -> None:
    class Killed(BaseException):
        pass

    def die(_: str) -> None:
        raise Killed

    site.gateway.on_launch = die
    with pytest.raises(Killed):
        site.submit()
    site.jobs = site.new_jobs()
    site.gateway.on_launch = lambda jobid: None
    assert site.gateway.launches == [site.submit()]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed("refused", phase=Phase.NOT_SENT),
        _with(Unauthorized("no"), 401),
        _with(NotFound("a proxy that knows no such way"), 404),
        _with(NotSupported("not on offer"), None, Phase.NOT_SENT),
    ],
)
def test_a_launch_that_did_not_happen_is_sent_again(site: Site, error: MarketplaceHpcError) -> None:
    site.gateway.on_launch = _raise(error)
    with pytest.raises(type(error)):
        site.submit()
    site.gateway.on_launch = lambda jobid: None
    jobid = site.submit()
    assert site.gateway.launches == [jobid, jobid]
    assert len(site.gateway.files) == 1


def test_status_600_is_a_refusal_unless_the_job_has_begun(site: Site) -> None:
    site.gateway.on_launch = _raise(failed(600))
    with pytest.raises(Unavailable, match="partition"):
        site.submit()

    def launch(jobid: str) -> None:
        site.records(jobid, mphpc_lock=0)
        raise failed(600)

    site.gateway.on_launch = launch
    jobid = site.submit()
    assert site.submit() == jobid
    assert site.gateway.launches == [jobid, jobid]


def test_a_gateway_that_keeps_its_own_script_launches_nothing(site: Site) -> None:
    def upload(jobid: str, name: str, content: bytes) -> None:
        if name != "job.sh":
            site.gateway.files[jobid][name] = content

    site.gateway.upload = upload  # type: ignore[method-assign]
    with pytest.raises(NotSupported, match=r"keeps the job script"):
        site.submit()
    assert site.gateway.launches == []


def test_pieces_that_did_not_arrive_keep_the_job_from_being_launched(site: Site, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 300_000)
    site.disk.putfile(tmp_path / "large", f"{WORK}/large")
    (files,) = site.gateway.files.values()
    (name,) = [name for name in files if name.startswith("mphpc-piece-")]
    content = files.pop(name)
    with pytest.raises(MarketplaceHpcError, match="pieces are not in the folder"):
        site.submit()
    # AiiDA puts the files again only when it uploads again; a piece that was noted missing is sent then.
    site.disk.putfile(tmp_path / "large", f"{WORK}/large")
    assert files[name] == content
    assert site.gateway.launches == [site.submit()]


def test_what_sbatch_would_refuse_is_refused_here(site: Site, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/bash\n#SBATCH --time\n")
    site.disk.putfile(tmp_path / "script", f"{WORK}/run.sh")
    with pytest.raises(SubmissionRefused, match="time"):
        site.submit()
    assert site.gateway.launches == []


def test_one_job_for_a_folder_however_many_want_it(site: Site) -> None:
    inside = threading.Barrier(2, timeout=10)
    made = []

    def create() -> None:
        made.append(1)
        inside.wait()

    site.gateway.on_create = create
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(site.gateway.job_of(WORK))) for _ in range(8)]
    for thread in threads:
        thread.start()
    inside.wait()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 1
    assert len(set(answers)) == 1
    assert len(answers) == 8


def test_a_creation_whose_answer_was_lost_leaves_no_second_job_in_the_journal(site: Site) -> None:
    def lose() -> None:
        raise ConnectionFailed("lost", phase=Phase.MAYBE_SENT)

    site.gateway.on_create = lose
    with pytest.raises(ConnectionFailed):
        site.gateway.job_of(WORK)
    site.gateway.on_create = lambda: None
    jobid = site.gateway.job_of(WORK)
    assert site.gateway.job_of(WORK) == jobid
    assert [folder.jobid for folder in site.gateway.journal.folders()] == [jobid]


def test_a_job_that_is_withdrawn_before_its_launch_is_not_launched(site: Site) -> None:
    none = site.jobs.create_job({"folder": WORK, "script": "run.sh"})
    site.jobs.cancel_job(none, unlaunched=True)
    with pytest.raises(Conflict):
        site.submit()
    assert site.gateway.launches == []
    # It has a job by now, which is cancelled like any other.
    jobid = site.jobs.create_job({"folder": WORK, "script": "run.sh"})
    site.jobs.cancel_job(jobid, unlaunched=True)
    assert "mphpc-cancel" in site.gateway.files[jobid]


def test_a_cancelled_job_that_has_not_begun_never_will(site: Site) -> None:
    jobid = site.submit()
    assert site.state(jobid)["state"] == "QUEUED"
    site.jobs.cancel_job(jobid)
    assert site.gateway.cancels == [jobid]
    job = site.state(jobid)
    assert (job["state"], job["final"]) == ("CANCELLED", True)


@pytest.mark.parametrize("answer", ["not launched", "refused", "sent"])
def test_a_cancelled_job_that_runs_is_not_done_before_it_says_so(site: Site, answer: str) -> None:
    jobid = site.submit()
    site.gateway.answer_to_cancel = answer
    site.records(jobid, mphpc_lock=0, mphpc_started_7=0, mphpc_beat_30=1)
    site.jobs.cancel_job(jobid)
    assert site.state(jobid)["state"] == "RUNNING"
    site.records(jobid, mphpc_ended_CANCELLED_143_100_160_0=0)
    job = site.state(jobid)
    assert (job["state"], job["final"], job["signal"], job["elapsed"]) == ("CANCELLED", True, 15, 60)
    site.jobs.cancel_job(jobid)
    assert site.gateway.cancels == [jobid]


def test_an_end_is_kept_when_the_folder_is_gone(site: Site) -> None:
    jobid = site.submit()
    site.records(jobid, mphpc_lock=0, mphpc_started_7=0, mphpc_ended_COMPLETED_0_100_160_0=0)
    assert site.state(jobid)["state"] == "COMPLETED"
    site.gateway.files[jobid].clear()
    site.jobs = site.new_jobs()
    assert site.state(jobid)["state"] == "COMPLETED"
    shown = site.jobs.show_job(jobid)
    assert (shown["exit_code"], shown["scheduler_id"], shown["accounting"]) == (0, "7", None)


def test_a_folder_that_cannot_be_listed_changes_nothing_until_the_end(site: Site) -> None:
    jobid = site.submit()

    def refuse(_: str) -> None:
        raise failed(500)

    site.gateway.on_look = refuse
    answer = site.jobs.job_states([jobid])
    assert answer["jobs"] == {}
    assert "unable" in answer["reasons"][jobid]
    site.gateway.files[jobid]["mphpc-end"] = b"FAILED\n3\n100\n160\n1\n7\n\n"
    job = site.state(jobid)
    assert (job["state"], job["exit_code"], job["scheduler_id"]) == ("FAILED", 3, "7")


def test_one_job_that_is_not_answered_keeps_no_other_from_being(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "_TOGETHER", 0.3)
    jobid = site.submit()
    hanging = threading.Event()

    def look(asked: str) -> None:
        if asked != jobid:
            hanging.wait(10)

    site.gateway.files["other"] = {}
    site.gateway.on_look = look
    answer = site.jobs.job_states(["other", jobid])
    hanging.set()
    assert set(answer["jobs"]) == {jobid}
    assert "did not answer" in answer["reasons"]["other"]


def test_a_refused_token_is_a_persons_matter(site: Site) -> None:
    jobid = site.submit()

    def refuse(_: str) -> None:
        raise Unauthorized("no")

    site.gateway.on_look = refuse
    with pytest.raises(Unauthorized):
        site.jobs.job_states([jobid])


class Silent:
    """A job that has begun, whose heart has stopped."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.jobid = site.submit()
        site.records(self.jobid, mphpc_lock=0, mphpc_started_7=0, mphpc_beat_30=1)
        assert site.state(self.jobid)["state"] == "RUNNING"

    def poll(self, beats: float) -> str:
        self.site.clock.sleep(beats * BEAT)
        return str(self.site.state(self.jobid)["state"])


@pytest.fixture
def silent(site: Site) -> Silent:
    return Silent(site)


def test_silence_alone_ends_no_job(silent: Silent) -> None:
    silent.site.gateway.answer_to_cancel = "refused"
    for _ in range(3):
        assert silent.poll(jobs_module.SILENCE / 3 - 1) == "RUNNING"
    assert silent.site.gateway.cancels == []
    # One poll after a long sleep of this machine's is no evidence, either.
    silent.site.records(silent.jobid, mphpc_beat_30=2)
    assert silent.poll(1) == "RUNNING"
    assert silent.poll(10 * jobs_module.SILENCE) == "RUNNING"
    assert silent.site.gateway.cancels == []


def test_a_silent_job_that_the_scheduler_does_not_have_has_ended(silent: Silent) -> None:
    silent.site.gateway.answer_to_cancel = "refused"
    states = [silent.poll(jobs_module.SILENCE / 2) for _ in range(4)]
    assert states == ["RUNNING"] * 3 + ["NODE_FAIL"]
    assert silent.site.gateway.cancels == [silent.jobid] * 3


def test_a_silent_job_that_the_scheduler_has_ends_by_its_own_word(silent: Silent) -> None:
    # It was suspended: what it gets now is SIGTERM, and it leaves its record.
    for _ in range(3):
        assert silent.poll(jobs_module.SILENCE / 2) == "RUNNING"
    assert silent.site.gateway.cancels == [silent.jobid] * 2
    silent.site.records(silent.jobid, mphpc_ended_CANCELLED_143_100_160_0=0)
    assert silent.poll(1) == "CANCELLED"


def test_a_silent_job_that_was_cancelled_and_stays_silent_as_long_again_has_ended(silent: Silent) -> None:
    """Slurm takes the cancellation of a job that it has just seen the end of without a word, and kills one that lives."""
    states = [silent.poll(jobs_module.SILENCE / 2) for _ in range(4)]
    assert states == ["RUNNING"] * 3 + ["NODE_FAIL"]


def test_a_heartbeat_begins_the_silence_anew(silent: Silent) -> None:
    silent.site.gateway.answer_to_cancel = "refused"
    for _ in range(3):
        assert silent.poll(jobs_module.SILENCE / 2) == "RUNNING"
    silent.site.records(silent.jobid, mphpc_beat_30=2)
    for _ in range(3):
        assert silent.poll(jobs_module.SILENCE / 2) == "RUNNING"


def test_questions_that_come_fast_count_once(silent: Silent) -> None:
    silent.site.gateway.answer_to_cancel = "refused"
    silent.poll(jobs_module.SILENCE / 2)
    for _ in range(20):
        silent.poll(jobs_module.SILENCE / 2 if silent.site.gateway.cancels == [] else 0)
    assert silent.site.gateway.cancels == [silent.jobid]


@pytest.mark.parametrize("state", ["TIMEOUT", "CANCELLED"])
def test_a_job_that_was_killed_while_it_ended_has_the_state_that_it_gave(silent: Silent, state: str) -> None:
    silent.site.gateway.answer_to_cancel = "refused"
    silent.site.gateway.files[silent.jobid][f"mphpc-ending-{state}"] = b""
    silent.site.gateway.files[silent.jobid][f"mphpc-ending-{state}-7"] = b""
    states = [silent.poll(2) for _ in range(4)]
    assert states == ["RUNNING"] * 3 + [state]
    assert silent.site.state(silent.jobid)["exit_code"] == 7
