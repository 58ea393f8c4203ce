"""What a failed sbatch means: never, not now, or nobody knows.

The messages are those of Slurm's ``slurm_strerror`` and of sbatch itself. They are looked for in this order: a word that puts
the outcome in doubt outweighs the rest, and a limit that will pass outweighs the general complaint printed beside it.
"""

from __future__ import annotations

import re

from aiida_marketplace_hpc.gateway.backends.base import BackendError, Deferred, Refused, Unknown

_RULES: tuple[tuple[type[BackendError], tuple[str, ...]], ...] = (
    (
        # The request may have arrived, the answer did not.
        Unknown,
        (
            r"Socket timed out on send/recv operation",
            r"Transport endpoint",
            r"Zero Bytes were transmitted or received",
            r"Unable to contact slurm controller \((send|receive|shutdown) failure\)",
            r"Message (send|receive) failure",
            r"Communication shutdown failure",
            r"Connection (reset|aborted|timed out)",
            r"Unexpected message received",
            r"Header lengths are longer than data received",
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
            r"Slurm backup controller in standby mode",
            r"Controller is in standby mode",
            r"(Could not establish a configuration source|Unable to process configuration file)",
            r"Munge encode failed",
            r"System submissions disabled",
            r"Requested operation is presently disabled",
            r"maintenance",
            r"Required partition not available \(inactive or drain\)",
            r"Partition in DOWN state",
            r"Required node not available \(down, drained or reserved\)",
            r"Requested partition configuration not available now",
            r"Requested nodes are busy",
            r"Required ports are in use",
            r"Unable to create job record, try again",
            r"I/O error writing script/environment to file",
        ),
    ),
    (
        Refused,
        (
            # A partition, account, qos, feature, time limit, reservation, ... or an option's value.
            r"\bInvalid (?!authentication|job credential)",
            r"No partition specified or system default partition",
            r"Requested node configuration is not available",
            r"Requested nodes not in this partition",
            r"Requested time limit is invalid",
            r"Requested reservation is invalid",
            r"Requested operation not supported on this system",
            r"More processors requested than permitted",
            r"Requested more tasks than available processors",
            r"(CPU|Task|Node) (count|distribution) specification invalid",
            r"Job size specification needs to be provided",
            r"Insufficient GRES available",
            r"GRES option unsupported",
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
    :returns: :class:`Refused`, :class:`Deferred` or, for everything that is not known for certain, :class:`Unknown`; the
        message is Slurm's own.
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
