"""Every route of the MIOSA API that is served, by family. The order is the order of matching."""

from __future__ import annotations

from gateway.dialects.miosa import (
    builds,
    documents,
    events,
    execution,
    files,
    keys,
    previews,
    sandboxes,
    snapshots,
    templates,
    terminals,
    usage,
    variables,
)
from gateway.dialects.miosa.route import Route

#: Name of each family in the OpenAPI document.
FAMILIES: dict[str, tuple[Route, ...]] = {
    "Sandboxes": sandboxes.ROUTES,
    "Snapshots and forks": snapshots.ROUTES,
    "Exec": execution.ROUTES,
    "Terminals": terminals.ROUTES,
    "Files": files.ROUTES,
    "Previews": previews.ROUTES,
    "Environment and logs": variables.ROUTES,
    "Templates": (*templates.ROUTES, *builds.ROUTES),
    "API keys": keys.ROUTES,
    "Events": events.ROUTES,
    "Usage": usage.ROUTES,
    "Documents": documents.routes(lambda: FAMILIES),
}

ROUTES = tuple(route for routes in FAMILIES.values() for route in routes)
SOCKETS = terminals.SOCKETS
