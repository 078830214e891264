"""The coordinator's processes and sites as they are now, and the registry brought to the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from common.errors import FlowerError
from common.keys import fingerprint, read_public_key
from server import stack
from server.registry.models import Site, SiteState
from server.registry.registry import Registry, now
from server.settings import CoordinatorFolder
from server.site_states import Link


@dataclass(frozen=True)
class Overview:
    """Processes, and each site's connection by name."""

    processes: tuple[stack.ProcessState, ...]
    links: Mapping[str, Link]
    taken: datetime


def look(folder: CoordinatorFolder, registry: Registry) -> Overview:
    """What runs and who is connected; the registry keeps the keys and when each site was seen.

    Raises:
        ConfigError: the folder is no coordinator folder, or a file in `sites/` is no public key.
    """
    keys = {name: fingerprint(read_public_key(path)) for name, path in folder.site_keys().items()}
    registry.sync_sites(keys)
    moment = now()
    try:
        state = stack.status(folder.path)
    except FlowerError as error:
        process = stack.ProcessState("superlink", None, False, str(error))
        return Overview((process,), build_links(registry.sites(), None), moment)
    for site in state.sites:
        if site.connected:
            registry.see_site(site.name, moment)
    answers = any(process.name == "superlink" and process.serving for process in state.processes)
    return Overview(state.processes, build_links(registry.sites(), state if answers else None), moment)


def build_links(sites: Sequence[Site], state: stack.StackState | None) -> dict[str, Link]:
    """Each site's connection; unknown without the SuperLink's word."""
    told = {site.name: site for site in state.sites} if state else {}
    links = {}
    for site in sites:
        found = told.get(site.name)
        links[site.name] = Link(
            connected=found.connected if found else None,
            detail=found.detail if found else "",
            revoked=site.state == SiteState.REVOKED,
        )
    return links
