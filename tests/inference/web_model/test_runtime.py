"""Where ONNX Runtime Web comes from: a registry, a cache, a file; and that nothing else is ever taken."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.ops.processes import free_port
from pneumofed.inference.web_model.runtime import NPM_REGISTRY, PINNED, RuntimePackage, cache_folder, load_runtime, npm_registry

SCRIPT, MODULE = b"export{a as b};", b"\0asm and so on"


def _archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in ((PINNED.script, SCRIPT), (PINNED.module, MODULE), ("package/other.js", b"other")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = _archive()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


PACKAGE = RuntimePackage("9.9.9", _hash(ARCHIVE), PINNED.script, _hash(SCRIPT), PINNED.module, _hash(MODULE))


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "npm_config_registry",
        "NPM_CONFIG_REGISTRY",
        "npm_config_userconfig",
        "NPM_CONFIG_USERCONFIG",
        "http_proxy",
        "HTTP_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry that has the package; what it was asked for."""
    asked: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(ARCHIVE)))
            self.end_headers()
            self.wfile.write(ARCHIVE)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm/")
    yield asked
    server.shutdown()
    server.server_close()


def test_the_package_is_fetched_once_and_then_taken_from_the_cache(registry: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        found = load_runtime(say=said.append, package=PACKAGE)
        assert (found.version, found.script, found.module) == ("9.9.9", SCRIPT.decode(), MODULE)
    assert registry == ["/npm/onnxruntime-web/-/onnxruntime-web-9.9.9.tgz"]
    assert len(said) == 1 and "fetching" in said[0]
    assert {path.name for path in (tmp_path / "cache/pneumofed/onnxruntime-web-9.9.9").iterdir()} == {
        Path(PINNED.script).name,
        Path(PINNED.module).name,
    }


def test_a_changed_cache_is_not_taken(registry: list[str], tmp_path: Path) -> None:
    load_runtime(package=PACKAGE)
    (tmp_path / "cache/pneumofed/onnxruntime-web-9.9.9" / Path(PINNED.module).name).write_bytes(b"something else")
    assert load_runtime(package=PACKAGE).module == MODULE
    assert len(registry) == 2


@pytest.mark.parametrize("field", ["sha256", "script_sha256", "module_sha256"])
def test_what_has_another_hash_is_refused(registry: list[str], field: str) -> None:
    with pytest.raises(BundleError, match="is not the file that this version of pneumofed was made with"):
        load_runtime(package=dataclasses.replace(PACKAGE, **{field: "0" * 64}))


def test_an_archive_is_taken_without_a_network(tmp_path: Path) -> None:
    path = tmp_path / PACKAGE.archive
    path.write_bytes(ARCHIVE)
    assert load_runtime(path, package=PACKAGE).module == MODULE
    path.write_bytes(ARCHIVE[:-3])
    with pytest.raises(BundleError, match="SHA-256"):
        load_runtime(path, package=PACKAGE)
    with pytest.raises(ConfigError, match="npm pack"):
        load_runtime(tmp_path / "nowhere.tgz", package=PACKAGE)


def test_an_unreachable_registry_gives_a_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{free_port()}/")
    with pytest.raises(ConfigError, match=r"`npm pack onnxruntime-web@9\.9\.9`.*give it with --runtime"):
        load_runtime(package=PACKAGE)


def test_the_registry_is_the_one_that_npm_would_ask(tmp_path: Path) -> None:
    settings = {"NPM_CONFIG_USERCONFIG": str(tmp_path / "npmrc")}
    assert npm_registry(settings) == NPM_REGISTRY
    (tmp_path / "npmrc").write_text("; a comment\n//one/:_authToken=x\nregistry = 'https://mirror.example/npm'\n")
    assert npm_registry(settings) == "https://mirror.example/npm"
    assert npm_registry(settings | {"npm_config_registry": "http://other.example"}) == "http://other.example"
    with pytest.raises(ConfigError, match="http or https"):
        npm_registry({"npm_config_registry": "file:///etc/"})


def test_the_cache_lies_where_the_user_keeps_caches(tmp_path: Path) -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/pneumofed")
    assert cache_folder({}) == cache_folder({"XDG_CACHE_HOME": "relative"}) == tmp_path / ".cache" / "pneumofed"
