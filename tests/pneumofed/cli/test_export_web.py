"""`pneumofed export --web` as a user types it. The runtime is a stand-in; a real one runs in `tests/inference/web_model`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pneumofed.cli.main import app
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.wire.keys import NodeKey, key_fingerprint, read_private_key
from pneumofed.inference.web_model import runtime
from pneumofed.inference.web_model.runtime import WebRuntime
from tests.model_bundles import make_bundle


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = WebRuntime("1.2.3", "var a=1;export{a as b};", b"\0asm")
    monkeypatch.setattr(runtime, "load_runtime", lambda *_, **__: stand_in)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


def test_a_bundle_becomes_a_page_and_no_bundle_is_made(bundle: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")}
    told = json.loads(export(bundle, "--web", tmp_path / "page", "--json").stdout)["web"]
    assert (told["precision"], told["signed"]) == ("int8", False)
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "page").iterdir())
    assert {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")} == before


def test_a_key_signs_the_page(bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(NodeKey.generate("someone").private)
    key.chmod(0o600)
    said = export(bundle, "--web", tmp_path / "page", "--key", key).stdout
    assert "open index.html" in said and "signed by SHA256:" in said
    checked = json.loads(export(tmp_path / "page", "--check", "--json").stdout)
    assert checked["signed_by"] == key_fingerprint(read_private_key(key).public_key())
    (tmp_path / "page" / "index.html").write_text("changed")
    with pytest.raises(BundleError, match=r"index\.html"):
        export(tmp_path / "page", "--check")


def test_only_a_trusted_bundle_becomes_a_page(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pub"
    other.write_bytes(NodeKey.generate("other").public)
    with pytest.raises(BundleError, match="does not trust"):
        export(bundle, "--web", tmp_path / "page", "--trusted", other)
    assert not (tmp_path / "page").exists()


def test_the_bundle_of_a_run_is_taken_if_it_is_there(bundle: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "bundle").symlink_to(bundle)
    told = json.loads(export(run, "--web", tmp_path / "page", "--json").stdout)
    assert list(told) == ["web"] and told["web"]["signed"]
    assert (run / "keys/release/node").is_file()


@pytest.mark.parametrize(
    "option", [["--calibration", "none"], ["--reference", "images"], ["--ages", "test=child"], ["--out", "other"]]
)
def test_options_that_make_a_bundle_are_refused_where_there_is_one(bundle: Path, tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{option[0]} make a bundle"):
        export(bundle, "--web", tmp_path / "page", *option)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_get_a_sentence_before_anything_is_made(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--runtime go with a page"):
        export(bundle, "--runtime", "x.tgz")
    with pytest.raises(ConfigError, match="--check makes nothing: leave out --web"):
        export(bundle, "--check", "--web", tmp_path / "page")
    (tmp_path / "kept").write_text("")
    with pytest.raises(ConfigError, match="never overwritten"):
        export(bundle, "--web", tmp_path)
    with pytest.raises(ConfigError, match="nowhere"):
        export(tmp_path / "nowhere", "--web", tmp_path / "page")
    damaged = tmp_path / "bundle.zip"
    damaged.write_bytes(b"no archive")
    with pytest.raises(BundleError, match="damaged"):
        export(damaged, "--web", tmp_path / "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.zip", "kept"]
