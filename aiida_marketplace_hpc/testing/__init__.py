"""What proves things on real parts: for the project's own tests, and for those of plugins that build on it.

``machine`` is where the cluster's side of a test runs (this machine as it is), ``cluster`` a part of it whose disk the AiiDA
side cannot see. On either of them ``slurm`` starts a real Slurm and ``gateway`` a gateway as its operator runs it.
``aiida_profile`` is the other side: an AiiDA installation with a daemon, ``aiida_session`` a Python session in it.
``fixtures`` offers all that to pytest, ``install`` brings the Debian packages. Nothing of it touches a Slurm, an AiiDA or any
configuration of the machine, except that one system account is created where tests run as root.

``proxy`` goes between a client and a gateway: it counts what passes, makes the way longer, and does what proxies and networks
do to requests, which ``faults`` lists; ``forwarder`` is a longer way to any server. ``platform`` is the
MarketPlace in front of a gateway, with such a proxy in front of itself.

``oidc`` is an OpenID Connect provider: who logs in, and how long tokens live, is what the test says.

``firecrest_v1`` is a FirecREST of the first version over real commands and jobs.

``rabbitmq`` is a real message broker, ``relay`` a relay as its operator runs it and whoever asks through the broker.

``stalls`` watches an event loop: when it stood still, and in whose code.

``backend`` and ``served`` are the other kind, quick and without a machine: a gateway in the test's own process, over a batch
system that does what the test says. ``faulty_scheduler`` makes any batch system misbehave, ``slurm_faults`` the commands of a
real Slurm; ``replica`` is a gateway that can be killed at each moment that counts, and ``clock`` the time in which it lives.
"""
