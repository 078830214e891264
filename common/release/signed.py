"""A JSON file with the signature of a party's P-384 key beside its content."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from common.config_types import Section
from common.data.atomic import atomic_write
from common.errors import ConfigError, ReleaseError
from common.hash_chain import canonical
from common.keys import PrivateKey, PublicKey, fingerprint, format_public_key, is_signed, parse_public_key, sign

MAX_BYTES = 2**24
S = TypeVar("S", bound=Section)


class Envelope(Section):
    """The file: what is told, by whose key (an OpenSSH line), and the signature of its canonical JSON."""

    content: dict[str, Any]
    key: str
    signature: str


def write_signed(path: Path, domain: bytes, content: Section, key: PrivateKey) -> None:
    """Writes `content` signed by `key`; `domain` says what it is, so that the signature can be taken for nothing else.

    Raises:
        ReleaseError: the file cannot be written.
    """
    told = content.model_dump(mode="json")
    public = format_public_key(key.public_key(), "").decode("ascii").strip()
    signature = base64.b64encode(sign(key, domain + canonical(told))).decode("ascii")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(Envelope(content=told, key=public, signature=signature).model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise ReleaseError(f"{path} cannot be written: {error.strerror}") from None


def read_signed(path: Path, domain: bytes, kind: type[S], trusted: Sequence[PublicKey] | None) -> tuple[S, str]:
    """(content, fingerprint of the signer) of the file at `path`; with `trusted` only of one of these.

    Raises:
        ReleaseError: it is missing, damaged, changed, not of this kind, or signed by a stranger.
    """
    try:
        with path.open("rb") as file:
            envelope = Envelope.model_validate_json(file.read(MAX_BYTES))
        key = parse_public_key(envelope.key.encode(), str(path))
        signature = base64.b64decode(envelope.signature, validate=True)
        whole = is_signed(key, domain + canonical(envelope.content), signature)
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read: {error.strerror}") from None
    except (ValidationError, ConfigError, binascii.Error, ValueError):
        raise ReleaseError(f"{path} is damaged or is something else; get it again from who signed it") from None
    if not whole:
        raise ReleaseError(f"{path} was changed after it was signed, or is something else; get it again from who signed it")
    signer = fingerprint(key)
    if trusted is not None and signer not in {fingerprint(known) for known in trusted}:
        raise ReleaseError(f"{path} is signed by {signer}, whom this place does not trust")
    try:
        return kind.model_validate_json(canonical(envelope.content)), signer
    except ValidationError as error:
        first = error.errors()[0]
        raise ReleaseError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; another version wrote it") from None
