"""Sealing and checking a bundle: `bundle.json` holds the SHA-256 of every file, `signature.json` an ECDSA signature of `bundle.json`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.model_bundle.manifest import FORMAT, MANIFEST, SIGNATURE_FILE, BundleManifest
from pneumofed.common.wire.keys import (
    PrivateKey,
    PublicKey,
    format_public_key,
    is_signed,
    key_fingerprint,
    parse_public_key,
    sign,
)

SEAL_DOMAIN = b"pneumofed model bundle 1\n"
"""Comes before `bundle.json` in what is signed, so that the signature can be taken for nothing else."""
MAX_FILES, MAX_BYTES, MAX_JSON_BYTES = 200, 4 * 2**30, 2**24


class SignatureFile(Section):
    """`signature.json`. Its text is the only one of its content, so that a changed byte is always seen."""

    format: int = FORMAT
    key: str
    """The signer's public key in OpenSSH's format."""
    fingerprint: str
    signature: str

    @property
    def text(self) -> bytes:
        return self.model_dump_json(indent=1).encode() + b"\n"


def seal_bundle(folder: Path, manifest: BundleManifest, key: PrivateKey) -> BundleManifest:
    """Writes `bundle.json` with the hashes of all files that lie in the folder, and its signature.

    Args:
        folder: with all other files of the bundle in it; an older seal is replaced.
        manifest: its `files` are filled in here.
        key: P-384 key of the coordinator, who answers for the bundle.

    Returns:
        The manifest as it was written.

    Raises:
        BundleError: the folder holds links, or more than a bundle may.
    """
    names = [name for name in list_files(folder) if name not in (MANIFEST, SIGNATURE_FILE)]
    complete = manifest.model_copy(update={"files": {name: hash_bundle_file(folder / name) for name in names}})
    text = _manifest_text(complete)
    public = format_public_key(key.public_key(), "").decode("ascii").strip()
    signature = base64.b64encode(sign(key, SEAL_DOMAIN + text)).decode("ascii")
    signed = SignatureFile(key=public, fingerprint=key_fingerprint(key.public_key()), signature=signature)
    for name, content in ((MANIFEST, text), (SIGNATURE_FILE, signed.text)):
        with atomic_write(folder / name) as file:
            file.write(content)
        (folder / name).chmod(0o644)  # a bundle holds no secret, and is handed on
    return complete


def check_seal(folder: Path, trusted: Sequence[PublicKey] | None) -> tuple[BundleManifest, str, str]:
    """Checks every byte of the bundle in a folder.

    Args:
        folder: the unpacked bundle.
        trusted: keys whose signature is taken; None takes any, an empty sequence none.

    Returns:
        (manifest, SHA-256 of `bundle.json`, fingerprint of the signer).

    Raises:
        BundleError: a file was changed, added or removed, the signature does not hold, or `trusted` is given and the signer is
            none of them.
    """
    names = list_files(folder)
    for name in (MANIFEST, SIGNATURE_FILE):
        if name not in names:
            raise BundleError(f"{folder} is no model bundle: it holds no {name}")
    text = _read(folder / MANIFEST, MAX_JSON_BYTES)
    signer = _check_signature(_read(folder / SIGNATURE_FILE, MAX_JSON_BYTES), text, trusted)
    manifest = _parse_manifest(text)
    _check_files(folder, manifest, names)
    return manifest, hashlib.sha256(text).hexdigest(), signer


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it and sorted.

    Raises:
        BundleError: something is neither file nor folder, or there is more than a bundle may hold.
    """
    names, total = [], 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place) / name
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path} is a link or a device, which a model bundle must not hold")
            names.append(path.relative_to(folder).as_posix())
            total += status.st_size
            if len(names) > MAX_FILES or total > MAX_BYTES:
                raise BundleError(f"{folder} holds more than {MAX_FILES} files or {MAX_BYTES} bytes, more than any model bundle")
    return sorted(names)


def hash_bundle_file(path: Path) -> str:
    """SHA-256 of the file in hexadecimal.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None


def _manifest_text(manifest: BundleManifest) -> bytes:
    values = manifest.model_dump(mode="json")
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _check_signature(content: bytes, manifest: bytes, trusted: Sequence[PublicKey] | None) -> str:
    _refuse_newer(content, SIGNATURE_FILE)
    broken = BundleError(f"{SIGNATURE_FILE} is damaged or was changed; get the bundle again from the coordinator")
    try:
        file = SignatureFile.model_validate_json(content)
        key = parse_public_key(file.key.encode(), SIGNATURE_FILE)
        signature = base64.b64decode(file.signature, validate=True)
    except (ValidationError, ConfigError, binascii.Error, ValueError):
        raise broken from None
    again = base64.b64encode(signature).decode("ascii")
    canonical = file.model_copy(update={"key": format_public_key(key, "").decode("ascii").strip(), "signature": again})
    if canonical.text != content or key_fingerprint(key) != file.fingerprint:
        raise broken
    if not is_signed(key, SEAL_DOMAIN + manifest, signature):
        raise BundleError(f"{MANIFEST} was changed after it was signed; get the bundle again from the coordinator")
    if trusted is not None and file.fingerprint not in {key_fingerprint(known) for known in trusted}:
        known = ", ".join(key_fingerprint(known) for known in trusted) or "none"
        raise BundleError(
            f"the bundle is signed by {file.fingerprint}, whom this place does not trust (trusted: {known}). If the coordinator reads "
            "the same fingerprint to you on the telephone, add their public key to the trusted ones; otherwise do not use it"
        )
    return file.fingerprint


def _parse_manifest(text: bytes) -> BundleManifest:
    _refuse_newer(text, MANIFEST)
    try:
        return BundleManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BundleError(f"{MANIFEST}: {place}: {first['msg']}; it was written by another version of pneumofed") from None


def _refuse_newer(text: bytes, name: str) -> None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise BundleError(f"{name} is no JSON; get the bundle again from the coordinator") from None
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(f"{name} does not say which format it has; get the bundle again from the coordinator")
    if version > FORMAT:
        raise BundleError(f"the bundle has format {version}, this pneumofed reads up to {FORMAT}: install a newer pneumofed")


def _check_files(folder: Path, manifest: BundleManifest, names: Sequence[str]) -> None:
    found, signed = set(names) - {MANIFEST, SIGNATURE_FILE}, set(manifest.files)
    for difference, what in ((signed - found, "lacks"), (found - signed, "holds, beside what was signed,")):
        if difference:
            shown = ", ".join(sorted(difference)[:3])
            raise BundleError(f"the bundle {what} {len(difference)} file(s): {shown}; get it again from the coordinator")
    for name, digest in manifest.files.items():
        if hash_bundle_file(folder / name) != digest:
            raise BundleError(f"{name} was changed after the bundle was signed; get it again from the coordinator")


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise BundleError(f"{path.name} is larger than {limit} bytes, which none of a model bundle is")
    return content
