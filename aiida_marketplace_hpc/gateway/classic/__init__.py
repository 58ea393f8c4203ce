"""``gateway serve --classic``: the published gateway's nine capabilities, as first published, and nothing else.

It is for programs that rely on the published answers to the letter, and for testing against gateways that are not this
package's. :mod:`~aiida_marketplace_hpc.gateway.classic.app` has the routes;
:mod:`~aiida_marketplace_hpc.gateway.classic.jobs` keeps users and jobs, and submits;
:mod:`~aiida_marketplace_hpc.gateway.classic.folder` does what the published gateway lets FirecREST do with files, and
:mod:`~aiida_marketplace_hpc.gateway.classic.firecrest` knows what of FirecREST shows through;
:mod:`~aiida_marketplace_hpc.gateway.classic.answers` writes answers as Flask and gunicorn do. Who a caller is, their home and
their roots, the backends and the server are those of every other gateway of this package.
"""
