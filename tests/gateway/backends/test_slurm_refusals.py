"""What a failed sbatch means: refused for good, not taken now, a fault of the set-up, or unknown."""

from __future__ import annotations

import pytest

from aiida_marketplace_hpc.gateway.backends.base import BackendError, Deferred, Fault, Refused, Unknown
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

RECORDED_DEFERRALS = [
    (1, f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED}{POLICY}\n"),
    (1, f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{FAILED}{POLICY}\n"),
    (1, f"{FAILED}Unable to contact slurm controller (connect failure)\n"),
    (1, f"{FAILED}Required partition not available (inactive or drain)\n"),
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
]

# The first four recorded from Slurm 22.05.8.
FAULTS = [
    (
        1,
        "sbatch: error: If munged is up, restart with --num-threads=10\n"
        'sbatch: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory'
        " (Did you start munged?)\n"
        "sbatch: error: slurm_send_node_msg: auth_g_create: REQUEST_SUBMIT_BATCH_JOB has authentication error\n"
        f"{FAILED}Protocol authentication error\n",
    ),
    (1, "sbatch: error: ClusterName needs to be specified\nsbatch: fatal: Unable to process configuration file\n"),
    (
        1,
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source\n",
    ),
    (255, "sbatch: unrecognized option '--parsable'\nTry \"sbatch --help\" for more information\n"),
    (255, "sbatch: unrecognized option '--open-mode=append'\nTry \"sbatch --help\" for more information\n"),
    (255, "sbatch: unrecognized option '--comment=marketplace-hpc:7'\n"),
    (255, "sbatch: option '--chdir=/a' is ambiguous; possibilities: '--chdir-to' '--chdir-from'\n"),
    (127, "sbatch: error while loading shared libraries: libslurmfull.so: cannot open shared object file\n"),
    (1, "sbatch: fatal: Parsing error at unrecognized key: SlurmctldHosts\n"),
]

UNKNOWNS = [
    (1, f"{FAILED}Socket timed out on send/recv operation\n"),
    (1, f"{FAILED}Unable to contact slurm controller (send failure)\n"),
    (1, f"{FAILED}Unable to contact slurm controller (receive failure)\n"),
    (1, f"{FAILED}Transport endpoint is not connected\n"),
    (1, f"{FAILED}Zero Bytes were transmitted or received\n"),
    (1, f"{FAILED}Message receive failure\n"),
    # The answer of the controller, which has taken the job, cannot be verified any more.
    (
        1,
        "sbatch: error: slurm_unpack_received_msg: auth_g_verify: RESPONSE_SUBMIT_BATCH_JOB has authentication error:"
        " Unspecified error\n"
        f"{FAILED}Protocol authentication error\n",
    ),
    (1, f"sbatch: error: Munge decode failed: Rewound credential\n{FAILED}Invalid authentication credential\n"),
    (1, f"{FAILED}Something that nobody has heard of\n"),
    (
        1,
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"
        f"{FAILED}Socket timed out on send/recv operation\n",
    ),
    (1, ""),
    (-9, f"{FAILED}Invalid partition name specified\n"),
]

# slurm_strerror of Slurm 22.05 to 26.05: every message that a submission can be answered with.
MESSAGES: dict[type[BackendError], tuple[str, ...]] = {
    Unknown: (
        "Unexpected message received",
        "Message send failure",
        "Message receive failure",
        "Communication shutdown failure",
        "Insane message length",
        "Unexpected missing socket error",
        "Connection timed out establishing",
        "Connection timed out writing",
        "Connection timed out reading",
        "Connection forced closed by quiesce timeout",
        "Kernel reported delayed socket error after successful write(), client side likely closed",
        "Process is shutting down and closing all communications",
        "Unable to contact slurm controller (send failure)",
        "Unable to contact slurm controller (receive failure)",
        "Unable to contact slurm controller (shutdown failure)",
        "Slurm internal error, contact system administrator",
        "Received zero length message",
        "Received message length < 0",
        "Failed to send entire message",
        "Header lengths are longer than data received",
        "Socket timed out on send/recv operation",
        "Zero Bytes were transmitted or received",
        # Nothing that a submission should be answered with: not known is ambiguous.
        "Duplicate job id",
        "Error configuring interconnect",
        "Job locked by another sibling",
        "Bad argument to plugin function",
        "Memory management error",
        "Job is pending execution",
        "Operation now in progress",
        "Invalid job credential",
    ),
    Fault: (
        "Incompatible versions of client and server code",
        "I/O stream version number error",
        "Protocol authentication error",
        "Plugin initialization failed",
        "Can't find an address, check slurm.conf",
        "Job script not specified",
        "Invalid user id",
        "Invalid group id",
        "Invalid user ID",
        "Unable to resolve user ID to user name",
        "Invalid group ID",
        "Unable to resolve group ID to group name",
        "Job cannot be submitted without the current working directory specified.",
        "ConfigLess mode is disabled in slurm configuration.",
        "Environment is missing in job",
        "User not found on host",
        "Group ID not found on host",
        "Invalid authentication credential",
        "Failed to open authentication public key",
        "Failed to connect to authentication agent",
        "Authentication credential invalid",
        "Authentication credential expired",
        "Cannot unpack credential",
        "Authentication does not apply to request",
        "Token Generation failed.",
        "Rejecting authentication of user nobody or group nobody",
        "Unable to query kernel for socket peer credential",
        "Lua script loading failed due to invalid syntax",
        "Requested Lua function not found",
        "Lua function returned nil or table instead of numeric result",
        "Lua function execution failed due to runtime error",
        "Plugin has invalid format or unable to be loaded",
        "Plugin missing required symbol or function",
        "Required plugin type not loaded or initialized",
        "Plugin file not found",
        "Plugin access denied",
        "Dlopen of plugin file failed",
        "Plugin init() callback failed",
        "Plugin name/type/version symbol missing",
        "Incompatible plugin version",
        "TLS missing but required for connection",
    ),
    Deferred: (
        "Communication connection failure",
        "Connection rejected by handler",
        "Connection refused",
        "No route to host",
        "Unable to contact slurm controller (connect failure)",
        "Rate limit exceeded, please retry momentarily",
        "Rate limit exceeded, please retry later",
        "Unable to create job record, try again",
        "MaxJobCount limit reached",
        "Immediate execution impossible, insufficient priority",
        "Requested partition configuration not available now",
        "Requested nodes are busy",
        "I/O error writing script/environment to file",
        "Error generating job credential",
        "Slurm backup controller in standby mode",
        "Controller is in standby mode, try a different controller",
        "Immediate execution impossible, resources too fragmented for allocation",
        "Immediate execution impossible. Individual job submission scheduling attempts deferred",
        "Requested operation is presently disabled",
        "Licenses currently unavailable",
        "Requested reservation not usable now",
        "Required ports are in use",
        "Required node not available (down, drained or reserved)",
        "Required partition not available (inactive or drain)",
        "Job can not start immediately",
        "Switch resources currently not available",
        "Partition in DOWN state",
        "System submissions disabled",
        "Job can not start due to maintenance reservation.",
        "Max powered up nodes reached",
        "Unable to connect to database",
        "Resource temporarily unavailable",
    ),
    Refused: (
        "Unspecified error",
        "Invalid MPI plugin name",
        "Invalid partition name specified",
        "No partition specified or system default partition",
        "Access/permission denied",
        "User's group not permitted to use this partition",
        "Requested nodes not in this partition",
        "More processors requested than permitted",
        "Node count specification invalid",
        "Job size specification needs to be provided",
        "Pathname of a file, directory or other parameter too long",
        "Requested node configuration is not available",
        "Invalid job id specified",
        "Invalid node name specified",
        "Task distribution specification invalid",
        "Task count specification invalid",
        "Invalid feature specification",
        "Requested operation not supported on this system",
        "Job dependency problem",
        "Only batch jobs are accepted or processed",
        "Current SwitchType does not permit arbitrary task distribution",
        "Requested more tasks than available processors",
        "Memory required by task is not available",
        "Invalid account or account/partition combination specified",
        "Invalid license specification",
        POLICY,
        "Requested time limit is invalid (missing or exceeds some limit)",
        "Access denied to requested reservation",
        "Requested reservation is invalid",
        "Invalid time specified",
        "Invalid wckey specification",
        "Requires more ports than can be reserved",
        "Invalid qos specification",
        "CPU count specification invalid",
        "Circular job dependency",
        "Invalid generic resource (gres) specification",
        "Requested account has breached requested QOS usage threshold",
        "Invalid job array specification",
        "Burst Buffer permission denied",
        "Burst Buffer resource limit exceeded",
        "Burst Buffer request invalid",
        "Invalid mcs_label specified",
        "Duplicate generic resource (gres) specification",
        "X11 forwarding not available",
        "Job --batch option is invalid or not a subset of --constraints",
        "Invalid Trackable RESource (TRES) specification",
        "Invalid GRES specification (with and without type identification)",
        "Multiple KNL NUMA and/or MCDRAM constraints require use of a heterogeneous job",
        "Requested GRES option unsupported by configured SelectType plugin",
        "Invalid --nice value",
        "Invalid time-min specification (exceeds job's time or other limits)",
        "Multiple partition job request not supported when a partition is set in the association",
        "Cannot request more threads per core than the job allocation",
        "Invalid preferred feature specification",
        "Insufficient GRES available in allocation",
        "Invalid container id specified",
        "Container support is not configured",
        "Container runtime not configured or invalid",
        "Invalid or unknown association",
        "Invalid QOS specification, relative QOS can only be used in a single partition per cluster.",
        "Invalid extra constraints specification",
        "RestrictedCoresPerGPU: Not enough unique cores per GPU",
        "RestrictedCoresPerGPU: No GPUs configured on node",
        "Requested topology configuration is not available",
        "Preemption is required but is disabled on this system",
        "Time limit specification required, but not provided",
        "Invalid cluster name",
        "Invalid cluster feature specification",
        "No eligible clusters for federated job",
    ),
}


@pytest.mark.parametrize(("code", "stderr"), RECORDED_REFUSALS)
def test_recorded_refusals_are_permanent(code: int, stderr: str) -> None:
    assert type(read_failure(code, stderr)) is Refused


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind, many in MESSAGES.items() for words in many])
def test_every_message_of_the_controller_is_of_one_class(kind: type[BackendError], words: str) -> None:
    assert type(read_failure(1, f"{FAILED}{words}\n")) is kind


@pytest.mark.parametrize(("code", "stderr"), FAULTS)
def test_a_wrong_set_up_is_a_fault_of_ours(code: int, stderr: str) -> None:
    assert type(read_failure(code, stderr)) is Fault


@pytest.mark.parametrize("option", ["--parsable-more", "--commentary=x", "--nonsense"])
def test_an_unknown_option_of_the_script_is_not_our_fault(option: str) -> None:
    assert type(read_failure(255, f"sbatch: unrecognized option '{option}'\n")) is Refused


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
