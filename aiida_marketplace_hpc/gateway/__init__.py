"""The gateway: publishes a cluster over HTTP.

A request goes through ``app`` (limits, request id, errors) and ``auth`` (who is it) to ``routes``; those work on ``files``
(everything below the roots) and on ``jobs``, which writes intentions into the ``ledger`` and lets ``reconcile`` carry them
out on one of the ``backends``.

With ``--classic`` the package ``classic`` stands in the place of ``app``, ``routes`` and ``jobs``: what was first published,
and nothing else. ``people`` are the pages for browsers, over the same jobs and files.

``relay`` is a process beside it, which fetches requests from a message broker where nobody can connect to the gateway.
"""
