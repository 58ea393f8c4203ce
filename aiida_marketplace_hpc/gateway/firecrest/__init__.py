"""A cluster that is reached through FirecREST: nothing of it is on the gateway's own machine.

:mod:`~aiida_marketplace_hpc.gateway.firecrest.client` makes the calls and says what went wrong with one,
:mod:`~aiida_marketplace_hpc.gateway.firecrest.tokens` has the tokens for them, and
:mod:`~aiida_marketplace_hpc.gateway.firecrest.accounts` knows as whom they are made. On top of them stand the files
(:mod:`~aiida_marketplace_hpc.gateway.firecrest.files` and ``transfers``) and, beside the other batch systems,
:mod:`aiida_marketplace_hpc.gateway.backends.firecrest`.
"""
