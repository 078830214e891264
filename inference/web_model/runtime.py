"""ONNX Runtime Web, which runs a graph in a browser: fetched from the npm registry, checked against the SHA-256 that stand here, and kept.

Of the package only what runs a graph in WebAssembly on the CPU is used: the script with its loader, and the WebAssembly module.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.files import atomic_write

NPM_REGISTRY = "https://registry.npmjs.org/"
TIMEOUT_SEC = 60
MAX_PACKAGE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class RuntimePackage:
    """A version of the npm package, by its hashes.

    Attributes:
        version: of the package `onnxruntime-web`.
        sha256: of its archive.
        script, script_sha256: path in the archive of the ECMAScript module, which holds the loader of the WebAssembly module.
        module, module_sha256: path of the WebAssembly module, which has the operators for the CPU.
    """

    version: str
    sha256: str
    script: str
    script_sha256: str
    module: str
    module_sha256: str

    @property
    def archive(self) -> str:
        """The archive's name in the registry."""
        return f"onnxruntime-web-{self.version}.tgz"


PINNED = RuntimePackage(
    version="1.30.0",
    sha256="d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
    script="package/dist/ort.wasm.bundle.min.mjs",
    script_sha256="11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    module="package/dist/ort-wasm-simd-threaded.wasm",
    module_sha256="3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
)
"""Reads the operators of opset 20 and the QDQ format that the exporter writes. Its threads are not used: they need headers of a server."""


@dataclass(frozen=True)
class WebRuntime:
    """What a page carries of ONNX Runtime Web: the text of its script, and its WebAssembly module."""

    version: str
    script: str
    module: bytes


def load_runtime(
    archive: Path | None = None, *, say: Callable[[str], None] = lambda _: None, package: RuntimePackage = PINNED
) -> WebRuntime:
    """Loads ONNX Runtime Web: from `archive`, else from the cache, else from the npm registry into the cache.

    Args:
        archive: a downloaded archive of the package (`npm pack`).
        say: takes a sentence before something is fetched.
        package: which version, and its hashes.

    Raises:
        ConfigError: there is no such archive, or the registry cannot be reached; the text says what to do.
        BundleError: what came is not the package that stands here.
    """
    if archive is not None:
        return _unpack(_read_archive(archive), package)
    folder = cache_folder() / f"onnxruntime-web-{package.version}"
    kept = _read_kept(folder, package)
    if kept is not None:
        return kept
    address = f"{npm_registry().rstrip('/')}/onnxruntime-web/-/{package.archive}"
    say(f"fetching ONNX Runtime Web {package.version} (once; it is kept in {folder})")
    runtime = _unpack(_fetch(address, package), package)
    _keep(folder, runtime, package)
    return runtime


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Finds the user's folder for what can be fetched again, `pneumofed` below `XDG_CACHE_HOME`, by default `~/.cache`."""
    base = environment.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "pneumofed"


def npm_registry(environment: Mapping[str, str] = os.environ) -> str:
    """Finds the npm registry as npm does: the variable `npm_config_registry`, in any case, else `registry` of the user's `.npmrc`.

    Raises:
        ConfigError: it is no http or https address.
    """
    settings = {name.lower(): value for name, value in environment.items()}
    known = settings.get("npm_config_registry") or _npmrc_registry(
        Path(settings.get("npm_config_userconfig") or Path.home() / ".npmrc")
    )
    address = known or NPM_REGISTRY
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise ConfigError("the npm registry (npm_config_registry, or registry in .npmrc) must be an http or https address")
    return address


def _npmrc_registry(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    pairs = (line.partition("=") for line in lines)
    return next((value.strip().strip("\"'") for name, _, value in pairs if name.strip() == "registry"), "")


def _read_archive(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give --runtime the archive that `npm pack` wrote") from None


def _fetch(address: str, package: RuntimePackage) -> bytes:
    """The archive at `address`; proxies are those of the environment, as everywhere in Python."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SEC) as answer:
            return answer.read(MAX_PACKAGE_BYTES)
    except (urllib.error.URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", "") or type(error).__name__
        raise ConfigError(
            f"ONNX Runtime Web cannot be fetched from the npm registry ({reason}); where there is a network run "
            f"`npm pack onnxruntime-web@{package.version}`, bring {package.archive} here and give it with --runtime"
        ) from None


def _unpack(content: bytes, package: RuntimePackage) -> WebRuntime:
    _check(content, package.sha256, f"the archive of ONNX Runtime Web {package.version}")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        found = [archive.extractfile(name) for name in (package.script, package.module)]
        script, module = (file.read() if file else b"" for file in found)
    return _runtime(script, module, package)


def _read_kept(folder: Path, package: RuntimePackage) -> WebRuntime | None:
    """What an earlier call kept; None where there is nothing, or something else than was kept."""
    try:
        script, module = ((folder / Path(name).name).read_bytes() for name in (package.script, package.module))
        return _runtime(script, module, package)
    except (OSError, BundleError):
        return None


def _keep(folder: Path, runtime: WebRuntime, package: RuntimePackage) -> None:
    """Writes the two files; a cache that cannot be written costs the next call its time, and nothing else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((package.script, runtime.script.encode()), (package.module, runtime.module)):
            with atomic_write(folder / Path(name).name) as file:
                file.write(content)
    except OSError:
        return


def _runtime(script: bytes, module: bytes, package: RuntimePackage) -> WebRuntime:
    _check(script, package.script_sha256, package.script)
    _check(module, package.module_sha256, package.module)
    return WebRuntime(package.version, script.decode(), module)


def _check(content: bytes, expected: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise BundleError(
            f"{what} is not the file that this version of pneumofed was made with: its SHA-256 is {found}, expected {expected}"
        )
