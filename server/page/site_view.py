"""What the page shows of sites and processes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.activity import EVENTS_FILE, read_activity
from server.overview import Overview, build_links
from server.page import schema
from server.page.views import without_paths
from server.registry.registry import Registry
from server.site_states import site_states


def view_sites(registry: Registry, overview: Overview | None, full: bool) -> schema.Sites:
    """Sites and processes as they are now; without `full`, file names are cut out."""
    known = registry.sites()
    open_runs = registry.open_runs()
    events: list[dict[str, Any]] = []
    for run in open_runs[-1:]:  # the newest: a site does one thing at a time
        events = read_activity(Path(run.folder) / EVENTS_FILE)
    links = overview.links if overview else build_links(known, None)
    states = site_states(links, events, datetime.now(UTC))
    rows = {site.name: site for site in known}
    lines = [
        schema.SiteLine(
            name=name,
            state=now.state,
            detail=now.detail,
            fingerprint=rows[name].fingerprint if name in rows else "",
            first_seen=rows[name].first_seen if name in rows else None,
            last_seen=rows[name].last_seen if name in rows else None,
        )
        for name, now in states.items()
    ]
    return schema.Sites(taken=overview.taken if overview else None, sites=lines, processes=_processes(overview, full))


def _processes(overview: Overview | None, full: bool) -> list[schema.ProcessLine]:
    found = overview.processes if overview else ()
    return [
        schema.ProcessLine(name=p.name, serving=p.serving, detail=p.detail if full else without_paths(p.detail)) for p in found
    ]
