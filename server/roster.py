"""Who is there: the map between Flower's nodes and the sites that answered the roll call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from common.messages import Failure, Presence


@dataclass
class Roster:
    """Sites by name. Everything that depends on an order uses `names`, since node ids differ from run to run.

    Attributes:
        expected_layout: digest of the model's layout at the coordinator; a site with another one cannot take part.
        absent: node -> why it is not a site of this run.
    """

    expected_layout: str
    nodes: dict[str, int] = field(default_factory=dict)
    presences: dict[str, Presence] = field(default_factory=dict)
    absent: dict[int, Failure] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted(self.nodes)

    def unknown(self, node_ids: list[int]) -> list[int]:
        """The nodes that were not asked yet."""
        known = set(self.nodes.values()) | set(self.absent)
        return [node for node in node_ids if node not in known]

    def keep_connected(self, node_ids: list[int]) -> list[str]:
        """Names of the sites that are connected now, sorted."""
        connected = set(node_ids)
        return [name for name in self.names if self.nodes[name] in connected]

    def forget_absent(self, errors: Collection[str]) -> None:
        """Lets those who are absent for one of these reasons be asked again."""
        self.absent = {node: failure for node, failure in self.absent.items() if failure.error not in errors}

    def admit(self, node: int, presence: Presence, connected: Collection[int]) -> None:
        """Takes a site in, or notes why not: another model layout, or a name that a connected node already has. A site that comes
        back as another node takes its own place again."""
        if presence.layout != self.expected_layout:
            self.absent[node] = Failure(presence.site, "MessageError", "the site builds another model; install the same version")
        elif self.nodes.get(presence.site) in connected:
            self.absent[node] = Failure(presence.site, "MessageError", "another node already answers under this site's name")
        else:
            self.nodes[presence.site] = node
            self.presences[presence.site] = presence

    def refuse(self, node: int, failure: Failure) -> None:
        self.absent[node] = failure

    def absences(self) -> Mapping[str, str]:
        """Reason by name (or node) of everyone who is not a site of this run."""
        return {failure.site or f"node {node}": str(failure) for node, failure in sorted(self.absent.items())}
