"""What a site holds in a secure sum: who it is to the others (`Identity`), and what it must remember between the steps (`MemoryFolder`).

    WORK/secure_sum/session.json   secrets and progress of the one sum that goes on; removed with its last step, or where one failed
    WORK/secure_sum/used           identifiers of all sums that were begun: none is begun twice
    WORK/secure_sum/serial         highest serial of a key roster that was seen

All in the site's own folder, since each message may start a new process, and with mode 0600. Progress is written before an answer leaves:
a step that was begun is never done again, since two answers to one step (two vectors under one mask, shares of both kinds of one site)
would give away what one answer hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from pneumofed.client.federation.site_data import read_connection
from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import ConfigError, SecureSumError
from pneumofed.common.files import StateFile
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory, authority_key, read_roster
from pneumofed.common.secure_aggregation.protocol import Key, Purpose, Share, SignedKeys, Site, SumSession
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


Progress = Literal["advertised", "shared", "masked", "confirmed"]


class HeldShares(Section):
    """What this site holds of another's (or its own) two secrets."""

    seed: Share
    key: Share


class Memory(Section):
    """One sum in progress. Secrets are emptied as soon as no later step needs them."""

    run: str
    round: int
    purpose: Purpose
    identifier: str
    settings: str
    progress: Progress
    roster: str
    """Text of the roster that was checked in the first step."""
    channel: Key | None = None
    mask: Key | None = None
    seed: Key | None = None
    """Private keys and the seed of the site's own mask."""
    keys: list[SignedKeys] = Field(default_factory=list)
    senders: list[Site] = Field(default_factory=list)
    """Whose pair masks may be in the sum."""
    held: dict[Site, HeldShares] = Field(default_factory=dict)
    survivors: list[Site] = Field(default_factory=list)

    def belongs_to(self, session: SumSession) -> bool:
        return SumSession(self.run, self.round, self.purpose, self.identifier, self.settings) == session


class MemoryFolder:
    """The folder of one site."""

    def __init__(self, work_dir: str) -> None:
        self.path = Path(work_dir) / "secure_sum"
        self._session: StateFile[Memory | None] = StateFile(
            self.path / "session.json",
            kind="the secure sum in progress",
            parse=Memory.model_validate_json,
            missing=None,
            remedy="this site takes no further part in it",
            dump=lambda memory: memory.model_dump_json().encode("ascii") if memory else b"",
        )
        self._used: StateFile[tuple[str, ...]] = StateFile(
            self.path / "used",
            kind="the list of secure sums that were begun",
            parse=lambda content: tuple(content.decode("ascii").split()),
            missing=(),
            remedy="restore it from a backup: without it an old sum could be begun again",
            refuse=SecureSumError,
            dump=lambda used: "\n".join(used).encode("ascii"),
        )
        self._serial: StateFile[int] = StateFile(
            self.path / "serial",
            kind="the serial of the newest key roster",
            parse=lambda content: int(content or 0),
            missing=0,
            remedy="restore it from a backup: without it an old roster could be used",
            refuse=SecureSumError,
            dump=lambda serial: str(serial).encode("ascii"),
        )

    @contextmanager
    def begin(self, session: SumSession, roster: KeyDirectory) -> Iterator[None]:
        """Forgets the sum before this one, and holds the folder while the block makes the new one's secrets.

        Args:
            session: of the new sum; remembered for ever as begun, even where the block fails.
            roster: checked already; its serial must not be below the highest that was seen.

        Raises:
            SecureSumError: this sum was begun before, the roster is older than one that was seen, or the file that remembers
                either is damaged.
        """
        with self._used.locked() as used:
            if session.identifier in used:
                raise SecureSumError("this secure sum was begun before; keys of an old one may be played again")
            seen = self._serial.read()
            if roster.serial < seen:
                raise SecureSumError(
                    f"the key roster has serial {roster.serial}, but {seen} was seen; a site may have been revoked since"
                )
            self._used.write((*used, session.identifier))
            self._serial.write(max(seen, roster.serial))
            self.forget()
            yield

    @contextmanager
    def step(self, session: SumSession, progress: Progress) -> Iterator[Memory]:
        """Reads the memory of a sum; the folder is held while the block lasts, which writes the new progress with `keep` or
        `forget`. Where the block fails the site has left the sum, and what it held of it is forgotten.

        Args:
            session: the sum that the coordinator names.
            progress: how far the sum must have come.

        Raises:
            SecureSumError: there is no such sum, or this step of it was done already or is not due.
        """
        if not self.path.is_dir():
            raise SecureSumError("this site takes no part in a secure sum")
        with self._session.locked() as memory:
            if memory is None or not memory.belongs_to(session):
                raise SecureSumError("this site takes no part in this secure sum, or it is over")
            if memory.progress != progress:
                raise SecureSumError(
                    f"this step needs a sum that is '{progress}', it is '{memory.progress}': it is asked for twice or too soon"
                )
            try:
                yield memory
            except BaseException:
                self.forget()
                raise

    def leave(self, session: SumSession) -> None:
        """Forgets this sum, in which the site takes no further part. Of another one that was begun since nothing is touched.

        Args:
            session: of the sum.
        """
        with self._session.locked() as memory:
            if memory is not None and memory.belongs_to(session):
                self.forget()

    def keep(self, memory: Memory) -> None:
        self._session.write(memory)

    def forget(self) -> None:
        self._session.remove()
