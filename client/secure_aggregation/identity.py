"""Who the site is to the others: its node key, and the authority that says who they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pneumofed.client.federation.site_data import read_connection
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import ConfigError, SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory, authority_key, read_roster
from pneumofed.common.wire.keys import PrivateKey, PublicKey, read_private_key


@dataclass(frozen=True)
class Identity:
    """A site's node key and the public key of the federation's certificate authority."""

    site: str
    node_key: PrivateKey
    authority: PublicKey

    @classmethod
    def of(cls, config: SiteConfig) -> Identity:
        """The site's identity.

        Raises:
            ConfigError: no connection file, or a key that it names cannot be read.
        """
        if config.connection is None:
            raise ConfigError("secure aggregation needs the site's node key: site.yaml has no connection.yaml beside it")
        connection = read_connection(Path(config.connection))
        return cls(config.name, read_private_key(Path(connection.key)), authority_key(Path(connection.ca)))

    def check_roster(self, text: str | None) -> KeyDirectory:
        """The roster, which this site is in.

        Raises:
            SecureSumError: there is none, the authority did not sign it, or it has another key for this site.
        """
        if text is None:
            raise SecureSumError("the coordinator sent no key roster; run `pneumofed provision` and give it its new kit")
        roster = read_roster(text, self.authority)
        if roster.key_of(self.site) != self.node_key.public_key():
            raise SecureSumError("the key roster has another key for this site; send keys/node.pub to whoever provisions")
        return roster
