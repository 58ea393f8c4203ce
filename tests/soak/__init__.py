"""Many calculations through AiiDA's daemon, while gateway and workers are killed under their hands: ``make soak``.

``campaign`` runs the calculations and kills by a plan, ``victims`` knows who is at work on a submission and kills them,
``account`` counts afterwards what the cluster's disk, Slurm's accounting, the gateway's ledger and AiiDA say.
"""
