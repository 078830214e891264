"""The sites at the SuperLink: registered by their public keys, refused once revoked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pneumofed.common.errors import FlowerError
from pneumofed.common.wire.keys import public_pem, read_public_key
from pneumofed.server.operations.settings import CoordinatorFolder

if TYPE_CHECKING:
    from pneumofed.server.operations.superlink import Node


@dataclass(frozen=True)
class SiteStatus:
    """One site as the coordinator sees it now."""

    name: str
    node_id: int | None
    """Flower's number for it; None where it is not registered."""
    connected: bool
    detail: str
    """`connected`, `registered, not connected yet`, `disconnected since ...`, `revoked`, `not registered`, `unknown: ...`."""


def register_sites(place: CoordinatorFolder) -> None:
    """Makes the SuperLink know exactly the keys of `place.site_keys()`.

    Raises:
        ConfigError: a file holds no public key.
        FlowerError: the SuperLink does not answer, or a key was revoked before, which Flower never takes again.
    """
    from pneumofed.server.operations.superlink import open_control

    wanted = {name: public_pem(read_public_key(path)) for name, path in place.site_keys().items()}
    with open_control(place) as control:
        nodes = control.nodes()
        known = {(node.name, node.public_key) for node in _live(nodes)}
        for node in _live(nodes):
            if wanted.get(node.name) != node.public_key:
                control.unregister(node.id)
        for name, key in wanted.items():
            if (name, key) not in known:
                _check_never_revoked(name, key, nodes)
                control.register(name, key)


def list_sites(place: CoordinatorFolder, superlink_serves: bool) -> tuple[SiteStatus, ...]:
    """Lists all sites that have a key file or are revoked, sorted by name.

    Args:
        place: the coordinator folder.
        superlink_serves: whether the SuperLink can be asked; without it each site's connection is unknown.
    """
    names, revoked = set(place.site_keys()), set(place.settings().revoked)
    nodes, unknown = _nodes_by_name(place) if superlink_serves else ({}, "unknown: the SuperLink does not answer")
    return tuple(
        _state(name, nodes.get(name), unknown or ("revoked" if name in revoked else "")) for name in sorted(names | revoked)
    )


def _nodes_by_name(place: CoordinatorFolder) -> tuple[dict[str, Node], str]:
    """The registered nodes, or why nothing is known of them: a question must not fail because the SuperLink is busy."""
    from pneumofed.server.operations.superlink import open_control

    try:
        with open_control(place) as control:
            return {node.name: node for node in _live(control.nodes())}, ""
    except FlowerError as error:
        return {}, f"unknown: {error}"


def _state(name: str, node: Node | None, other: str) -> SiteStatus:
    if other:
        return SiteStatus(name, node.id if node else None, False, other)
    if node is None:
        return SiteStatus(name, None, False, "not registered")
    if node.status == "online":
        return SiteStatus(name, node.id, True, "connected")
    since = node.last_deactivated_at
    return SiteStatus(name, node.id, False, f"disconnected since {since}" if since else "registered, not connected yet")


def _live(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if node.status != "unregistered"]


def _check_never_revoked(name: str, key: bytes, nodes: Iterable[Node]) -> None:
    if any(node.public_key == key for node in nodes):
        raise FlowerError(
            f"site {name}: this key was revoked, renamed or is another site's, and Flower takes no key twice; "
            f"the site makes a new pair and sends its node.pub"
        )
