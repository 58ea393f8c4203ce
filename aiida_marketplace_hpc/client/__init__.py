"""The client: every capability of a gateway as a Python method. Everything here blocks.

A call goes through ``gateway`` (what can be asked) to ``routes`` (where it is sent: directly or through the MarketPlace's
proxy; ``application`` knows what is on offer there), ``passage`` (what gets through on that way, and with ``packing`` in
which form) and ``session``, which takes the token from ``auth`` (``login`` renews
what ``logins`` keeps, by asking an ``oidc`` provider), asks ``retry`` whether a failed attempt may be repeated and
sends over ``connection`` (sockets that keep to a deadline and know whether anything left this machine). What comes back
goes through ``answer``, or where nothing does, through ``failure``. ``transfer`` moves files and folders, for which
``folder`` turns local folders into bundles and back; ``files`` gives the cluster's disk the semantics that AiiDA expects.
``far`` chooses between all that and ``classic``, for gateways that have only the nine published capabilities.
"""
