"""What a failed sbatch means: refused for good, not taken now, or unknown."""

from __future__ import annotations

import pytest

from aiida_marketplace_hpc.gateway.backends.base import BackendError, Deferred, Refused, Unknown
from aiida_marketplace_hpc.gateway.backends.slurm_refusals import read_failure

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"

# Recorded from Slurm 22.05.8: exit code and stderr.
RECORDED_REFUSALS = [
    (1, f"sbatch: error: invalid partition specified: nope\n{FAILED}Invalid partition name specified\n"),
    (1, f"{FAILED}Invalid account or account/partition combination specified\n"),
    (1, f"{FAILED}Invalid qos specification\n"),
    (1, f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{FAILED}{POLICY}\n"),
    (1, f"{FAILED}Invalid feature specification\n"),
    (1, f"{FAILED}Invalid generic resource (gres) specification\n"),
    (1, f"{FAILED}Invalid license specification\n"),
    (1, f"{FAILED}Invalid node name specified\n"),
    (1, f"{FAILED}Requested reservation is invalid\n"),
    (1, f"{FAILED}Job dependency problem\n"),
    (1, f"{FAILED}User's group not permitted to use this partition\n"),
    (
        1,
        "sbatch: error: Memory specification can not be satisfied\n"
        f"{FAILED}Requested node configuration is not available\n",
    ),
    (255, "sbatch: unrecognized option '--nonsense'\nTry \"sbatch --help\" for more information\n"),
    (255, "sbatch: option requires an argument -- 'J'\nTry \"sbatch --help\" for more information\n"),
    (255, "sbatch: error: Invalid --time specification\n"),
    (255, "sbatch: error: Invalid --mail-type specification\n"),
    (255, "Invalid time specification (pos=0): xx\nsbatch: error: Invalid --begin specification\n"),
    (255, 'sbatch: error: "x" is not a valid node count\n'),
    (255, 'sbatch: error: Invalid numeric value "foo" for --ntasks.\n'),
    (255, "sbatch: error: --uid only permitted by root user\n"),
    (1, 'sbatch: error: unrecognized --hint argument "foo", see --hint=help\n'),
    (1, 'sbatch: fatal: stdin: line 2: Unmatched `"` in [--foo="a]\n'),
    (255, "sbatch: error: Invalid directive found in batch script: foo\n"),
    (
        1,
        "sbatch: error: This does not look like a batch script.  The first\n"
        "sbatch: error: line must start with #! followed by the path to an interpreter.\n"
        "sbatch: error: For instance: #!/bin/sh\n",
    ),
    (1, "sbatch: error: Batch script is empty!\n"),
    (
        1,
        "sbatch: error: Batch script contains DOS line breaks (\\r\\n)\n"
        "sbatch: error: instead of expected UNIX line breaks (\\n).\n",
    ),
    (
        1,
        "sbatch: error: The Slurm controller does not allow scripts that\nsbatch: error: contain a NULL character '\\0'.\n",
    ),
    (1, "sbatch: error: No cluster 'nope' known by database.\n"),
]

# slurm_strerror of 22.05 and 25.11, where it could not be recorded.
OTHER_REFUSALS = [
    "Requested time limit is invalid (missing or exceeds some limit)",
    "More processors requested than permitted",
    "Node count specification invalid",
    "CPU count specification invalid",
    "Memory required by task is not available",
    "Access/permission denied",
    "Requested nodes not in this partition",
    "Invalid job array specification",
    "Invalid wckey specification",
    "Insufficient GRES available in allocation",
    POLICY,
    "Unspecified error",
]

RECORDED_DEFERRALS = [
    (1, f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}{POLICY}\n"),
    (1, f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{FAILED}{POLICY}\n"),
    (1, f"{FAILED}Unable to contact slurm controller (connect failure)\n"),
    (1, f"{FAILED}Required partition not available (inactive or drain)\n"),
    (
        1,
        "sbatch: error: If munged is up, restart with --num-threads=10\n"
        'sbatch: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory'
        " (Did you start munged?)\n"
        "sbatch: error: slurm_send_node_msg: auth_g_create: REQUEST_SUBMIT_BATCH_JOB has authentication error\n"
        f"{FAILED}Protocol authentication error\n",
    ),
    (1, "sbatch: error: ClusterName needs to be specified\nsbatch: fatal: Unable to process configuration file\n"),
]

OTHER_DEFERRALS = [
    f"sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n{FAILED}Resource temporarily unavailable",
    f"sbatch: error: Slurm job queue full, sleeping and retrying\n{FAILED}MaxJobCount limit reached",
    f"sbatch: error: QOSGrpSubmitJobsLimit\n{FAILED}{POLICY}",
    f"sbatch: error: MaxSubmitJobsPerAccount\n{FAILED}{POLICY}",
    f"{FAILED}Rate limit exceeded, please retry momentarily",
    f"{FAILED}System submissions disabled",
    f"{FAILED}Job can not start due to maintenance reservation.",
    f"{FAILED}Slurm backup controller in standby mode",
    f"{FAILED}I/O error writing script/environment to file",
    "sbatch: fatal: Could not establish a configuration source",
]

UNKNOWNS = [
    (1, f"{FAILED}Socket timed out on send/recv operation\n"),
    (1, f"{FAILED}Unable to contact slurm controller (send failure)\n"),
    (1, f"{FAILED}Unable to contact slurm controller (receive failure)\n"),
    (1, f"{FAILED}Transport endpoint is not connected\n"),
    (1, f"{FAILED}Zero Bytes were transmitted or received\n"),
    (1, f"{FAILED}Protocol authentication error\n"),
    (1, f"{FAILED}Message receive failure\n"),
    (1, f"{FAILED}Something that nobody has heard of\n"),
    (
        1,
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
        f"{FAILED}Socket timed out on send/recv operation\n",
    ),
    (1, ""),
    (-9, f"{FAILED}Invalid partition name specified\n"),
    (127, "sbatch: error while loading shared libraries: libslurmfull.so\n"),
]


@pytest.mark.parametrize(("code", "stderr"), RECORDED_REFUSALS)
def test_recorded_refusals_are_permanent(code: int, stderr: str) -> None:
    assert type(read_failure(code, stderr)) is Refused


@pytest.mark.parametrize("words", OTHER_REFUSALS)
def test_refusals_of_the_controller_are_permanent(words: str) -> None:
    assert type(read_failure(1, f"{FAILED}{words}\n")) is Refused


@pytest.mark.parametrize(("code", "stderr"), RECORDED_DEFERRALS)
def test_recorded_deferrals_are_temporary(code: int, stderr: str) -> None:
    assert type(read_failure(code, stderr)) is Deferred


@pytest.mark.parametrize("stderr", OTHER_DEFERRALS)
def test_what_passes_is_temporary(stderr: str) -> None:
    assert type(read_failure(1, stderr)) is Deferred


@pytest.mark.parametrize(("code", "stderr"), UNKNOWNS)
def test_what_may_have_arrived_and_what_is_not_known_is_ambiguous(code: int, stderr: str) -> None:
    assert type(read_failure(code, stderr)) is Unknown


@pytest.mark.parametrize(
    ("code", "stderr", "message"),
    [
        (*RECORDED_REFUSALS[2], "Batch job submission failed: Invalid qos specification"),
        (*RECORDED_REFUSALS[12], "unrecognized option '--nonsense'"),
        (
            *RECORDED_REFUSALS[0],
            "invalid partition specified: nope; Batch job submission failed: Invalid partition name specified",
        ),
        (2, "", "sbatch ended with exit code 2 and without a word"),
    ],
)
def test_the_message_is_slurms_own(code: int, stderr: str, message: str) -> None:
    error: BackendError = read_failure(code, stderr)
    assert str(error) == message
