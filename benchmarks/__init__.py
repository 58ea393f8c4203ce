"""How fast it is, told as ratios to what people use else, measured side by side in one run: ``make bench``.

``stage`` brings up what is compared, each as its users run it: a gateway, nginx, an sshd (``servers``), and ways of
some length to each (``line``); ``clients`` and ``worker`` are the other ends. ``job_stage`` is the same for jobs: a
real Slurm with a gateway and an sshd. ``files``, ``calculations`` and ``jobs`` do the same work with each of them in
turns, as ``measure`` says, ``polls`` asks for the states of many jobs (``crowd`` puts them into the ledger), ``load``
asks for as much as it can get, and ``report`` prints the tables and writes ``docs/benchmarks.md``. Nothing here demands
that it is fast: a slow machine fails no test. What was moved must have arrived.
"""

__version__ = "1"
