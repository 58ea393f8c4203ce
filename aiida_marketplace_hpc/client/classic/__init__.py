"""AiiDA on a *classic* gateway: one that has only the nine published capabilities.

Such a gateway has flat job folders of its own choosing, no folders inside, no copies, no links, no job states. So what AiiDA
wants of the cluster's disk before a job is written down here first (``journal``), and is done by the job script itself
(``script``, ``job.sh``), which also leaves records of how the job is and what lies in its folder (``records``, ``manifest``)::

    transport ─ disk ─┬─ journal (SQLite: which gateway job a working directory is, what was made in it)
                      ├─ pieces  (files up and down, in bodies that the gateway takes)
    scheduler ─ jobs ─┴─ script, records

``names`` says which paths are working directories and which names survive the journey; ``gateway`` asks for the nine and says
what their answers mean.
"""
