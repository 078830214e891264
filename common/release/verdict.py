"""A site's verdict on a new model against the old one: counts, differences and variances on its own validation patients."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.config_types import Section
from common.errors import ReleaseError
from common.evaluation.comparison import Comparison
from common.keys import PrivateKey, PublicKey
from common.release.signed import read_signed, write_signed

DOMAIN = b"pneumofed site verdict 1\n"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SiteVerdict(Section):
    """What a site tells; no image and no patient, but how both models do on its validation set, which may be small."""

    format: Literal[1] = 1
    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    time: datetime
    old: Digest
    """Digests of the two bundles."""
    new: Digest
    comparison: Comparison


def write_verdict(path: Path, verdict: SiteVerdict, key: PrivateKey) -> None:
    """Writes the verdict, signed with the site's node key.

    Raises:
        ReleaseError: the file cannot be written.
    """
    write_signed(path, DOMAIN, verdict, key)


def read_verdict(path: Path, keys: Mapping[str, PublicKey]) -> SiteVerdict:
    """The verdict at `path`, signed with the very key that `keys` has for its site.

    Raises:
        ReleaseError: it is damaged, of a site that is not known, or signed by another.
    """
    told, _ = read_signed(path, DOMAIN, SiteVerdict, None)
    if told.site not in keys:
        raise ReleaseError(f"{path}: no key of {told.site} is known; give the coordinator folder, whose sites/ holds it")
    return read_signed(path, DOMAIN, SiteVerdict, [keys[told.site]])[0]
