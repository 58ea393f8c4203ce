"""What this gateway is, and what can be asked of it. These two pages load nothing from anywhere else.

The page on which people see their jobs is :mod:`aiida_marketplace_hpc.gateway.people`.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from aiida_marketplace_hpc import __version__
from aiida_marketplace_hpc.gateway.account import SEPARATION
from aiida_marketplace_hpc.gateway.config import Settings
from aiida_marketplace_hpc.protocol import CAPABILITIES, OPERATIONS

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
code { background: #eef2f6; padding: .1em .3em; border-radius: 3px }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #d5dde5 }
small { color: #52606d }
"""
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""What a browser may load for these pages: their own style."""


def front_page(settings: Settings) -> str:
    """What this gateway is, and where to go from here."""
    return _page(settings.name, f"<h1>{escape(settings.name)}</h1>{front_content(settings)}")


def front_content(settings: Settings) -> str:
    """The same, without heading and head, as HTML."""
    return f"""<p>This is an HPC gateway: it lets programs run jobs on a cluster and reach files there over HTTP.
It is running version {escape(__version__)} of <code>aiida-marketplace-hpc</code> with the backend
<code>{escape(settings.backend)}</code>.</p>
<p>{escape(SEPARATION[settings.account_mode])}</p>
<ul>
<li><a href="docs">What can be asked of it</a> (<a href="openapi.json">as an OpenAPI document</a>)</li>
<li><a href="heartbeat">Whether it is up</a></li>
</ul>
<p>Every request of a program but the heartbeat needs the header <code>Authorization: Bearer TOKEN</code>. From Python use
<code>aiida_marketplace_hpc.HpcGateway</code>, from a shell <code>marketplace-hpc</code>, from AiiDA the transport and
scheduler <code>marketplace_hpc</code>.</p>"""


def api_page(settings: Settings) -> str:
    """The capability table and the operations of ``query``, from the table that the routes are made of."""
    capabilities = "".join(
        f"<tr><td><code>{escape(row.name)}</code></td><td><code>{row.method} {escape(row.path)}</code></td>"
        f"<td>{escape(row.summary)}"
        + "".join(f"<br><small><code>{escape(p.name)}</code> {escape(p.description)}</small>" for p in row.parameters)
        + "</td></tr>"
        for row in CAPABILITIES
    )
    operations = "".join(
        f"<tr><td><code>{escape(row.name)}</code></td><td>{escape(', '.join(row.required))}</td>"
        f"<td>{escape(', '.join(row.optional))}</td><td>{escape(row.summary)}</td></tr>"
        for row in OPERATIONS.values()
    )
    return _page(
        f"{settings.name}: API",
        f"""<h1>What can be asked of this gateway</h1>
<p>The same as an <a href="openapi.json">OpenAPI document</a>. <a href=".">Back</a></p>
<table><tr><th>Capability</th><th>Request</th><th>What it does, and its parameters</th></tr>{capabilities}</table>
<h2>Operations of <code>query</code></h2>
<p>The body is <code>{{"operations": [{{"op": "stat", "path": "/…"}}, …]}}</code>, the answer
<code>{{"results": [{{"ok": true, "result": {{…}}}}, …]}}</code> in the same order.</p>
<table><tr><th>Operation</th><th>Needs</th><th>May have</th><th>What it does</th></tr>{operations}</table>""",
    )


def _page(title: str, content: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{content}</body></html>'
    )
