"""What lies in a page's folder: `contents.json` with the SHA-256 of every file, and its signature in the form of a bundle's."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.model_bundle.manifest import SIGNATURE_FILE
from pneumofed.common.model_bundle.sealing import SignatureFile, hash_bundle_file
from pneumofed.common.wire.keys import (
    PrivateKey,
    PublicKey,
    format_public_key,
    is_signed,
    key_fingerprint,
    parse_public_key,
    sign,
)

CONTENTS = "contents.json"
CONTENTS_DOMAIN = b"pneumofed web model 1\n"
"""Comes before `contents.json` in what is signed, so that the signature can be taken for nothing else."""


def write_contents(folder: Path, made_of: Mapping[str, str], key: PrivateKey | None) -> None:
    """Writes `contents.json` with the hashes of all files in a folder, and `signature.json` where there is a key.

    Args:
        folder: with all other files in it.
        made_of: what the files were made of, for `contents.json`.
        key: signs; None leaves the contents without a signature.
    """
    files = {path.name: hash_bundle_file(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"format": 1, **made_of, "files": files}, indent=1).encode() + b"\n"
    write_public(folder / CONTENTS, text)
    if key is not None:
        public = format_public_key(key.public_key(), "").decode("ascii").strip()
        signature = base64.b64encode(sign(key, CONTENTS_DOMAIN + text)).decode("ascii")
        signed = SignatureFile(key=public, fingerprint=key_fingerprint(key.public_key()), signature=signature)
        write_public(folder / SIGNATURE_FILE, signed.text)


def check_contents(folder: Path, trusted: Sequence[PublicKey] | None = None) -> tuple[dict[str, Any], str | None]:
    """Checks every file of a page's folder.

    Args:
        folder: the page's.
        trusted: keys of which one must have signed; None takes any, and none at all.

    Returns:
        (`contents.json`, fingerprint of the signer or None).

    Raises:
        BundleError: a file was changed, added or removed, the signature does not hold, or it is of none of the `trusted`.
    """
    try:
        text = (folder / CONTENTS).read_bytes()
        contents: dict[str, Any] = json.loads(text)
        expected = dict(contents["files"])
    except (OSError, ValueError, TypeError, KeyError):
        raise BundleError(f"{folder} is no page of `pneumofed export --web`: its {CONTENTS} is missing or damaged") from None
    found = {
        path.name: hash_bundle_file(path) for path in sorted(folder.iterdir()) if path.name not in (CONTENTS, SIGNATURE_FILE)
    }
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if changed:
        raise BundleError(f"changed, added or removed since the page was made: {', '.join(changed[:3])}; get the page again")
    signer = _signer(folder / SIGNATURE_FILE, text)
    if trusted is not None and signer not in {key_fingerprint(key) for key in trusted}:
        raise BundleError(f"the page is signed by {signer or 'nobody'}, whom this place does not trust; do not use it")
    return contents, signer


def write_public(path: Path, content: bytes) -> None:
    """Writes a file that everybody may read: a page holds no secret, and is handed on.

    Args:
        path: in a folder that exists.
        content: the whole of it.
    """
    with atomic_write(path) as file:
        file.write(content)
    path.chmod(0o644)


def _signer(path: Path, contents: bytes) -> str | None:
    """Fingerprint of who signed; None where nobody did."""
    if not path.exists():
        return None
    try:
        file = SignatureFile.model_validate_json(path.read_bytes())
        key = parse_public_key(file.key.encode(), SIGNATURE_FILE)
        holds = is_signed(key, CONTENTS_DOMAIN + contents, base64.b64decode(file.signature, validate=True))
    except (OSError, ValidationError, ConfigError, binascii.Error, ValueError):
        holds = False
    if not holds:
        raise BundleError(f"{SIGNATURE_FILE} does not fit {CONTENTS}: one of them was changed; get the page again")
    return key_fingerprint(key)
