"""What a failed sbatch means: never, not now, not before somebody mends the gateway's set-up, or nobody knows.

The messages are those of Slurm's ``slurm_strerror`` (22.05 to 26.05) and of sbatch itself. They are looked for in this
order: a word that puts the outcome in doubt outweighs the rest, a fault of the set-up outweighs the refusal that it looks
like, and a limit that will pass outweighs the general complaint printed beside it.
"""

from __future__ import annotations

import re

from aiida_marketplace_hpc.gateway.backends.base import BackendError, Deferred, Fault, Refused, Unknown

_RULES: tuple[tuple[type[BackendError], tuple[str, ...]], ...] = (
    (
        # The request may have arrived, the answer did not.
        Unknown,
        (
            r"Socket timed out on send/recv operation",
            r"Transport endpoint",
            r"Zero Bytes were transmitted or received",
            r"Received zero length message",
            r"Received message length < 0",
            r"Failed to send entire message",
            r"Unable to contact slurm controller \((send|receive|shutdown) failure\)",
            r"Message (send|receive) failure",
            r"Communication shutdown failure",
            r"Connection (reset|aborted|timed out|forced closed)",
            r"Kernel reported delayed socket error",
            r"Process is shutting down and closing all communications",
            r"Unexpected (missing socket|message received)",
            r"Insane message length",
            r"Header lengths are longer than data received",
            # The answer came, but cannot be trusted: the credential on it is bad, or munged has just gone.
            r"RESPONSE_\w+ has authentication error",
            r"Munge decode failed",
            r"Slurm internal error, contact system administrator",
        ),
    ),
    (
        Fault,
        (
            # sbatch does not start, or finds no configuration, no plugin.
            r"error while loading shared libraries",
            r"Could not establish a configuration source",
            r"Unable to process configuration file",
            r"ConfigLess mode is disabled",
            r"Parsing error at unrecognized key",
            r"Can't find an address, check slurm\.conf",
            r"Plugin initialization failed",
            r"Plugin (has invalid format|missing required|file not found|access denied|init\(\) callback|name/type/version)",
            r"Required plugin type not loaded",
            r"Dlopen of plugin file failed",
            r"Incompatible plugin version",
            r"(Couldn't find|cannot find|Couldn't load) (the specified|\w+) plugin",
            # What the gateway itself adds.
            r"(unrecognized|ambiguous) option '--(parsable|chdir|comment|open-mode|job-name)\b(?!-)",
            r"option '--(parsable|chdir|comment|open-mode|job-name)(=[^']*)?' is ambiguous",
            r"Job cannot be submitted without the current working directory",
            r"Job script not specified",
            r"Environment is missing in job",
            # Whom the gateway is to Slurm. Bare, these are the controller's own words: it took nothing.
            r"Munge encode failed",
            r"Protocol authentication error",
            r"Incompatible versions of client and server code",
            r"I/O stream version number error",
            r"TLS missing but required",
            r"Invalid authentication credential",
            r"Authentication credential (invalid|expired)",
            r"Authentication does not apply to request",
            r"Authentication failure",
            r"Failed to (open authentication public key|connect to authentication agent)",
            r"Cannot unpack credential",
            r"Token Generation failed",
            r"Rejecting authentication of user nobody",
            r"Unable to query kernel for socket peer credential",
            r"Invalid (user|group) id\b",
            r"Unable to resolve (user|group) ID",
            r"(User|Group ID) not found on host",
            r"Unauthorized credential",
            # A site's submission check that is broken itself.
            r"\bLua (script loading failed|function|state)",
            r"Requested Lua function not found",
            r"NULL Lua state pointer",
            r"unparsable Lua type",
        ),
    ),
    (
        Deferred,
        (
            r"MaxSubmitJob",
            r"GrpSubmitJob",
            r"MaxJobCount limit reached",
            r"Slurm job queue full",
            r"Slurm temporarily unable to accept job",
            r"Job creation temporarily disabled",
            r"Resource temporarily unavailable",
            r"Rate limit exceeded",
            r"Unable to contact slurm controller \(connect failure\)",
            r"Communication connection failure",
            r"Connection (refused|rejected by handler)",
            r"No route to host",
            r"Network is (unreachable|down)",
            r"Slurm backup controller in standby mode",
            r"Controller is in standby mode",
            r"System submissions disabled",
            r"Requested operation is presently disabled",
            r"maintenance",
            r"Immediate execution impossible",
            r"Job can not start immediately",
            r"Required partition not available \(inactive or drain\)",
            r"Partition in DOWN state",
            r"Required node not available \(down, drained or reserved\)",
            r"Requested partition configuration not available now",
            r"Requested reservation not usable now",
            r"Requested nodes are busy",
            r"Required ports are in use",
            r"Licenses currently unavailable",
            r"Switch resources currently not available",
            r"Max powered up nodes reached",
            r"Unable to create job record, try again",
            r"I/O error writing script/environment to file",
            r"Error generating job credential",
            r"Unable to connect to database",
        ),
    ),
    (
        Refused,
        (
            # A partition, account, qos, feature, time limit, reservation, ... or an option's value.
            r"\bInvalid (?!job credential)",
            r"No partition specified or system default partition",
            r"Requested node configuration is not available",
            r"Requested topology configuration is not available",
            r"Requested nodes not in this partition",
            r"Requested time limit is invalid",
            r"Time limit specification required",
            r"Requested reservation is invalid",
            r"Requested operation not supported on this system",
            r"Requested account has breached requested QOS usage threshold",
            r"More processors requested than permitted",
            r"Requested more tasks than available processors",
            r"Cannot request more threads per core",
            r"(CPU|Task|Node) (count|distribution) specification invalid",
            r"does not permit arbitrary task distribution",
            r"Requires more ports than can be reserved",
            r"Job size specification needs to be provided",
            r"Insufficient GRES available",
            r"GRES option unsupported",
            r"Duplicate generic resource \(gres\) specification",
            r"RestrictedCoresPerGPU",
            r"Multiple KNL NUMA and/or MCDRAM constraints",
            r"--batch option is invalid",
            r"X11 forwarding not available",
            r"Container (support is not configured|runtime not configured)",
            r"Preemption is required but is disabled",
            r"No eligible clusters for federated job",
            r"is not a valid node count",
            r"Maximum node count .* is less than minimum node count",
            r"Memory specification can not be satisfied",
            r"Memory required by task is not available",
            r"Access denied to requested reservation",
            r"Job dependency problem",
            r"Circular job dependency",
            r"Burst Buffer (permission denied|request invalid|resource limit exceeded)",
            r"Access/permission denied",
            r"User's group not permitted to use this partition",
            r"Job violates accounting/QOS policy",
            r"Multiple partition job request not supported",
            r"Pathname of a file, directory or other parameter too long",
            r"Only batch jobs are accepted",
            r"Numeric argument .* too large",
            r"mutually exclusive",
            r"incompatible with --",
            r"unrecognized --[\w-]+ argument",
            r"(unrecognized|ambiguous) option",
            r"option .* (is ambiguous|requires an argument|doesn't allow an argument)",
            r"option requires an argument",
            r"Unmatched `",
            r"Unexpected `:`",
            r"only permitted by root user",
            r"This does not look like a batch script",
            r"Batch script (is empty|contains only whitespace|contains DOS line breaks)",
            r"contain a NULL character",
            r"Script .*is too (big|large)",
            r"No cluster '.*' known by database",
            # What a site's own submission check answers; its reason stands in the lines before.
            r"Batch job submission failed: Unspecified error",
        ),
    ),
)
_TABLE = tuple((kind, re.compile("|".join(patterns), re.IGNORECASE)) for kind, patterns in _RULES)

_PREFIX = re.compile(r"^sbatch: (?:(?:error|fatal|warning): )?", re.MULTILINE)


def read_failure(returncode: int, stderr: str) -> BackendError:
    """Make the error that a failed sbatch stands for.

    :param returncode: sbatch's exit code; negative: the signal that killed it.
    :param stderr: everything it wrote there.
    :returns: :class:`Refused`, :class:`Deferred`, :class:`Fault` or, for everything that is not known for certain,
        :class:`Unknown`; the message is Slurm's own.
    """
    words = plain_words(stderr) or f"sbatch ended with exit code {returncode} and without a word"
    if returncode >= 0:
        for kind, pattern in _TABLE:
            if pattern.search(stderr):
                return kind(words)
    return Unknown(words)


def plain_words(stderr: str) -> str:
    """Strip sbatch's prefixes and join its lines."""
    lines = (line.strip() for line in _PREFIX.sub("", stderr).splitlines())
    return "; ".join(line for line in lines if line and not line.startswith('Try "sbatch --help"'))
