"""The page for people, at ``/``: their jobs and files in a browser, without a line of JavaScript.

A browser gets here through ``routes``, which knows by a cookie (``cookies``) which session it has (``sessions``), and to a
session by ``sign_in``. From a session comes the same :class:`~aiida_marketplace_hpc.gateway.service.Caller` as from the token
of a program, so whatever ``views`` show is what the capabilities answer to that caller. What users have written is made
``readable`` first, and escaped by the templates.
"""
