"""What the page's folder holds: nothing from outside, one script policy, hashes of everything, words in both languages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import QUANTIZED, SIGNATURE_FILE, OperatingPoint
from pneumofed.common.wire.keys import NodeKey, key_fingerprint, parse_private_key
from pneumofed.inference.web_model import page as web_page
from pneumofed.inference.web_model.contents import CONTENTS, check_contents
from pneumofed.inference.web_model.page import (
    ROOM_STATIC,
    STATIC,
    facts_of,
    link_scripts,
    read_words,
    write_page,
)
from pneumofed.inference.web_model.runtime import WebRuntime
from tests.inference.web_model.node import NODE
from tests.model_bundles import signing_key

RUNTIME = WebRuntime(
    "1.2.3", "var a=1,b=2;export{a as InferenceSession,b as default};\n//# sourceMappingURL=x.map\n", b"\0asm module"
)


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page") / "page"
    write_page(bundle, RUNTIME, made, signing_key())
    return made


class Parts(HTMLParser):
    """The texts of scripts and styles, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[tuple[str, dict[str, str | None], str]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.append((*self._open, data))
            self._open = None

    @property
    def policy(self) -> dict[str, list[str]]:
        found = next(values["content"] for _, values in self.attributes if values.get("http-equiv") == "Content-Security-Policy")
        assert found
        return {words[0]: words[1:] for words in (part.split() for part in found.split(";"))}


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return Parts((folder / "index.html").read_text(encoding="utf-8"))


def test_the_policy_lets_the_page_connect_to_nothing_and_names_every_script_and_style(parts: Parts) -> None:
    def integrity(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = parts.policy
    assert policy["connect-src"] == policy["default-src"] == policy["form-action"] == policy["base-uri"] == ["'none'"]
    scripts = [integrity(text) for tag, values, text in parts.texts if tag == "script" and values["type"] == "module"]
    assert len(scripts) == 2
    assert policy["script-src"] == [*scripts, "'wasm-unsafe-eval'"]
    assert policy["style-src"] == [integrity(text) for tag, _, text in parts.texts if tag == "style"]
    assert not set(policy) - {
        *(
            "default-src",
            "script-src",
            "style-src",
            "img-src",
            "manifest-src",
            "worker-src",
            "connect-src",
            "base-uri",
            "form-action",
        )
    }


def test_nothing_comes_from_outside_and_nothing_runs_from_an_attribute(folder: Path, parts: Parts) -> None:
    for _, values in parts.attributes:
        assert not any(name.startswith("on") or name == "style" for name in values)
        assert not any((values.get(name) or "").startswith(("http", "//")) for name in ("src", "href"))
    for path in (*STATIC.glob("*.js"), *STATIC.glob("*.css"), folder / "sw.js", folder / "manifest.json"):
        assert not re.search(r"https?://|url\(|@import", path.read_text(encoding="utf-8")), path.name
    for path in STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\bfetch\(|XMLHttp", text
        ), path


def test_the_page_holds_the_bundles_graph_and_the_runtime_as_they_are(bundle: Bundle, parts: Parts) -> None:
    blocks = {str(values["id"]): text for tag, values, text in parts.texts if tag == "script" and "id" in values}
    assert gzip.decompress(base64.b64decode(blocks["graph"])) == bundle.read(QUANTIZED)
    assert gzip.decompress(base64.b64decode(blocks["runtime"])) == RUNTIME.module
    assert json.loads(blocks["facts"]) == json.loads(json.dumps(facts_of(bundle, "int8", RUNTIME.version)))


def test_the_same_bundle_gives_the_same_page(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    write_page(bundle, RUNTIME, tmp_path / "again")
    assert (tmp_path / "again" / CONTENTS).read_bytes() == (folder / CONTENTS).read_bytes()
    assert not (tmp_path / "again" / SIGNATURE_FILE).exists(), "without a key there is no signature"
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_contents_hold_the_hash_of_every_file_and_are_signed(bundle: Bundle, folder: Path) -> None:
    text = (folder / CONTENTS).read_bytes()
    contents = json.loads(text)
    others = {path.name: path for path in folder.iterdir() if path.name not in (CONTENTS, SIGNATURE_FILE)}
    assert contents["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in others.items()}
    assert contents["bundle"] == bundle.digest
    found, signer = check_contents(folder, [signing_key().public_key()])
    assert found == contents and signer == key_fingerprint(signing_key().public_key())


def test_whatever_is_changed_in_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    def changed(name: str, content: bytes | None) -> Path:
        copy = tmp_path / f"{name}-{content!r}"[:40]
        shutil.copytree(folder, copy)
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
        return copy

    for name in ("index.html", "sw.js"):
        for content in ((folder / name).read_bytes() + b" ", None):
            with pytest.raises(BundleError, match=f"changed, added or removed since the page was made: {name}"):
                check_contents(changed(name, content))
    with pytest.raises(BundleError, match=r"extra\.js"):
        check_contents(changed("extra.js", b"more"))
    with pytest.raises(BundleError, match="does not fit"):
        check_contents(changed(CONTENTS, (folder / CONTENTS).read_bytes().replace(b"phantom-test", b"phantom-best")))
    with pytest.raises(BundleError, match="does not fit"):
        check_contents(changed(SIGNATURE_FILE, b"{}"))
    unsigned = changed(SIGNATURE_FILE, None)
    assert check_contents(unsigned)[1] is None
    other = parse_private_key(NodeKey.generate("other").private, "test").public_key()
    for place, keys in ((folder, [other]), (unsigned, [other])):
        with pytest.raises(BundleError, match="does not trust"):
            check_contents(place, keys)
    with pytest.raises(BundleError, match="is no page"):
        check_contents(tmp_path)


def test_the_worker_checks_each_file_that_the_page_needs(folder: Path) -> None:
    text = (folder / "sw.js").read_text(encoding="utf-8")
    found = re.search(r"const FILES = (\{.*?\});", text, re.DOTALL)
    assert found
    files = json.loads(found[1])
    assert set(files) == {"index.html", "manifest.json", "icon.svg", "icon-192.png", "icon-512.png"}
    for name, integrity in files.items():
        assert integrity == f"sha256-{base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode()}"
    icons = json.loads((folder / "manifest.json").read_text())["icons"]
    assert {icon["src"] for icon in icons} <= set(files)


def test_a_folder_that_holds_something_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_page(bundle, RUNTIME, tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_both_languages_say_everything_that_the_page_asks_for() -> None:
    tables = {}
    for language in ("en", "zh"):
        tables[language] = read_words(ROOM_STATIC / f"words_{language}.js") | read_words(STATIC / f"words_{language}.js")
    own = [read_words(STATIC / f"words_{language}.js") for language in ("en", "zh")]
    assert list(own[0]) == list(own[1])
    holes = [{key: set(re.findall(r"\{(\w+)\}", text)) for key, text in table.items()} for table in own]
    assert holes[0] == holes[1]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in own[1].values())
    scripts = [*STATIC.glob("*.js"), ROOM_STATIC / "judgement.js", ROOM_STATIC / "gauge.js"]
    texts = [path.read_text(encoding="utf-8") for path in (*scripts, Path(web_page.__file__).parent / "templates" / "index.html")]
    used = {
        key
        for text in texts
        for key in re.findall(r'data-t(?:-\w+)?="([^"]+)"|\bt(?:Or)?\("([\w.]+)"', text)
        for key in key
        if key
    }
    used |= {f"web.graph_{precision}" for precision in ("int8", "float32")} | {"web.calibrated", "web.not_calibrated"}
    used |= {
        f"fact.{name}" for name in re.findall(r'^    \["(\w+)", ', (STATIC / "page.js").read_text(encoding="utf-8"), re.MULTILINE)
    }
    for path in STATIC.glob("*.js"):
        used |= {f"error.{reason}" for reason in re.findall(r'ImageProblem\([^)]*?"(\w+)"', path.read_text(encoding="utf-8"))}
    for table in tables.values():
        assert sorted(key for key in used if key not in table) == []
    embedded = re.search(r"modules\.words_en = .*?byDefault = (\{.*?\});\n", link_scripts(), re.DOTALL)
    assert embedded
    assert used <= set(json.loads(embedded[1])), "what the page says is in the page"


def test_circles_and_unknown_forms_of_imports_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_page, "STATIC", tmp_path)
    (tmp_path / "one.js").write_text('import { b } from "./two.js";\nexport const a = 1;\n')
    (tmp_path / "two.js").write_text('import { a } from "./one.js";\nexport const b = 2;\n')
    with pytest.raises(BundleError, match="circle: one -> two -> one"):
        link_scripts("one")
    (tmp_path / "two.js").write_text('export * from "./three.js";\n')
    with pytest.raises(BundleError, match=r"two\.js imports or exports"):
        link_scripts("one")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_every_script_is_correct_and_linking_keeps_what_modules_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.mjs").write_text(link_scripts(), encoding="utf-8")
    subprocess.run([str(NODE), "--check", str(tmp_path / "page.mjs")], check=True)
    monkeypatch.setattr(web_page, "STATIC", tmp_path)
    (tmp_path / "one.js").write_text(
        'import { two, Two } from "./two.js";\nimport words from "./three.js";\nconst own = two() + new Two().n;\n'
        "console.log(own, words.a);\n"
    )
    (tmp_path / "two.js").write_text(
        "const own = 40;\nexport function two() {\n  return own;\n}\nexport class Two {\n  n = 2;\n}\n"
    )
    (tmp_path / "three.js").write_text("export default {\n  a: 1,\n};\n")
    (tmp_path / "linked.mjs").write_text(link_scripts("one"), encoding="utf-8")
    ran = subprocess.run([str(NODE), str(tmp_path / "linked.mjs")], check=True, capture_output=True, text=True)
    assert ran.stdout == "42 1\n"


def test_every_module_of_the_page_is_used_and_imports_only_what_is_exported() -> None:
    linked = link_scripts()
    assert {path.stem for path in STATIC.glob("*.js")} <= set(re.findall(r"^modules\.(\w+) = ", linked, re.MULTILINE))
    exported: dict[str, set[str]] = {}
    for name, body in re.findall(r"^modules\.(\w+) = \(\(\) => \{\n(.*?)^\}\)\(\);", linked, re.MULTILINE | re.DOTALL):
        for names, other in re.findall(r"^const \{([^}]*)\} = modules\.(\w+);", body, re.MULTILINE):
            wanted = {word.strip() for word in names.split(",")}
            assert wanted <= exported[other], (name, other)
            for word in wanted:
                assert len(re.findall(rf"\b{word}\b", body)) > 1, f"{name}.js imports {word} and does not use it"
        returned = re.search(r"^return \{ (.*?) \};\n\Z", body, re.MULTILINE)
        assert returned
        exported[name] = set(returned[1].split(", "))


def test_a_page_at_a_hospitals_own_threshold_decides_there_and_names_it(bundle: Bundle, tmp_path: Path) -> None:
    own = OperatingPoint(value=0.123, policy="youden", target=0.9, raw_value=0.2, site="north")
    write_page(bundle.deciding_at(own), RUNTIME, tmp_path / "page")
    page = Parts((tmp_path / "page" / "index.html").read_text(encoding="utf-8"))
    facts = json.loads(next(text for _, values, text in page.texts if values.get("id") == "facts"))
    assert (facts["threshold"], facts["threshold_of"], facts["digest"]) == (0.123, "north", bundle.digest)
