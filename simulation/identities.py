"""Node keys of virtual hospitals, so that secure aggregation runs in a simulation as it does between real ones.

FOLDER/ca/                   the simulated federation's certificate authority
FOLDER/keys/NAME/node        private node key of each hospital
FOLDER/keys/NAME/connection.yaml   where its key and the authority's certificate lie
FOLDER/roster.json           the signed roster of all public keys
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml

from common.keys import format_public_key, read_private_key, write_node_key
from common.secure_sum.roster import issue_roster
from server.provisioning.authority import open_authority

NOBODY = "localhost:1"
"""The coordinator's address in a connection file that is read for its keys alone."""
YEARS = timedelta(days=3650)


def write_identities(folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], Path]:
    """(each hospital's connection file, the roster) in `folder`; keys that lie there are kept."""
    authority = open_authority(folder / "ca", "simulation", datetime.now(UTC) + YEARS)
    connections, keys = {}, {}
    for name in names:
        own = folder / "keys" / name
        if not (own / "node").is_file():
            write_node_key(own, name)
        keys[name] = format_public_key(read_private_key(own / "node").public_key(), name)
        connections[name] = own / "connection.yaml"
        paths = {"coordinator": NOBODY, "key": "node", "ca": str((folder / "ca" / "ca.crt").resolve())}
        connections[name].write_text(yaml.safe_dump(paths), encoding="utf-8")
    roster = folder / "roster.json"
    roster.write_text(issue_roster(authority.federation, keys, 1, authority.key), encoding="utf-8")
    return connections, roster
