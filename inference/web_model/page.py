"""The page: one HTML file that holds model, runtime and code, and beside it what an installation needs.

A browser lets no page that was opened from a folder read another file, and the content security policy here lets a page send and fetch
nothing at all. So everything lies in `index.html`: the scripts, which the policy names by their SHA-256, and the graph and the WebAssembly
module as blocks of base 64 of gzip, which are no scripts. The files beside it (manifest, icons, service worker) are for servers.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.folder_lock import owned
from pneumofed.common.imaging.dicom_views import REGION_CODES, VIEW_CODES, Code
from pneumofed.common.imaging.patient_groups import CHEST_PARTS, KINDS, OTHER_PARTS
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import NETWORK, QUANTIZED
from pneumofed.common.model_bundle.suitability import MAX_ASPECT, MAX_COLOUR, SUITABILITY_TESTS, Suitability
from pneumofed.common.ops.render import render
from pneumofed.common.wire.keys import PrivateKey
from pneumofed.inference.web_model.contents import write_contents, write_public
from pneumofed.inference.web_model.runtime import WebRuntime

PAGE, WORKER, APP, LICENSES = "index.html", "sw.js", "manifest.json", "licenses.txt"
ICONS = ("icon.svg", "icon-192.png", "icon-512.png")
THEME = "#13181c"

STATIC = Path(__file__).parent / "static"
ROOM_STATIC = Path(__file__).parents[1] / "reading_room" / "static"
"""The reading room's files: both pages show a judgement with the same words, drawn by the same code."""
STYLES = (ROOM_STATIC / "base.css", ROOM_STATIC / "judgement.css", STATIC / "page.css")
ROOM_WORDS = ("notice", "top.phantom", "verdict", "label", "reason", "population", "group", "gauge", "finding", "error")
"""First parts of the keys that the page takes over from the reading room's words."""

_IMPORT = re.compile(r'^import (?:\{([^}]*)\}|(\w+)) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:const|function|class) (\w+))", re.MULTILINE)
_DEFAULT = re.compile(r"^export default ", re.MULTILINE)


@dataclass(frozen=True)
class WebPage:
    """A page that was written: its folder, the arithmetic of its graph, and bytes by file."""

    folder: Path
    precision: str
    sizes: Mapping[str, int]


def write_page(bundle: Bundle, runtime: WebRuntime, folder: Path, key: PrivateKey | None = None) -> WebPage:
    """Writes the page of a bundle into a new folder, which appears whole or not at all.

    Args:
        bundle: opened, hence checked.
        runtime: that runs its graph.
        folder: new or empty.
        key: signs `contents.json`; None leaves it without a signature.

    Raises:
        ConfigError: `folder` holds something, or another export writes there; or the model takes clinical values, for which the page has
            no form.
        BundleError: the bundle's files were changed after it was opened.
    """
    if bundle.manifest.model.clinical is not None:
        raise ConfigError(
            f"{bundle.manifest.name} takes clinical values beside the image, and the page has no form for them; use `predict`"
        )
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.web")
    with owned(staging, "export", "pneumofed export --web", "wait for it, or give another folder"):
        try:
            check_new(folder)
            made = staging / folder.name
            shutil.rmtree(made, ignore_errors=True)  # of an export that was killed
            made.mkdir()
            precision = _write_files(bundle, runtime, made, key)
            if folder.is_dir():
                folder.rmdir()
            made.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return WebPage(folder, precision, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})


def check_new(folder: Path) -> None:
    """Checks that a page can be written into `folder`.

    Raises:
        ConfigError: it holds something, or is none.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists: a page is never overwritten; give another folder")


def _write_files(bundle: Bundle, runtime: WebRuntime, folder: Path, key: PrivateKey | None) -> str:
    """Writes all files and returns the precision of the graph."""
    precision = "int8" if QUANTIZED in bundle.manifest.files else "float32"
    graph = bundle.read(QUANTIZED if precision == "int8" else NETWORK)
    write_public(folder / PAGE, _page(facts_of(bundle, precision, runtime.version), runtime, graph).encode())
    for name in (*ICONS, LICENSES):
        write_public(folder / name, (STATIC / name).read_bytes())
    write_public(folder / APP, json.dumps(_app(bundle.manifest.name), indent=1, ensure_ascii=False).encode() + b"\n")
    kept = {name: _integrity((folder / name).read_bytes()) for name in (PAGE, APP, *ICONS)}
    worker = render(__package__, WORKER, version=json.dumps(_digest_of(kept)), files=json.dumps(kept, indent=2))
    write_public(folder / WORKER, worker.encode())
    made_of = {
        "bundle": bundle.digest,
        "name": bundle.manifest.name,
        "pneumofed": version("pneumofed"),
        "onnxruntime_web": runtime.version,
    }
    write_contents(folder, made_of, key)
    return precision


def _page(facts: Mapping[str, Any], runtime: WebRuntime, graph: bytes) -> str:
    scripts = [_as_global(runtime.script), link_scripts()]
    style = "\n".join(path.read_text(encoding="utf-8") for path in STYLES)
    for text in scripts:
        if re.search(r"</script|<!--", text, re.IGNORECASE):
            raise BundleError("a script of the page holds the end of a script; report this")
    hashes = " ".join(f"'{_integrity(text.encode())}'" for text in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes} 'wasm-unsafe-eval'; style-src '{_integrity(style.encode())}'; "
        "img-src 'self' data:; manifest-src 'self'; worker-src 'self'; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    return render(
        __package__,
        PAGE,
        policy=policy,
        icon=_base64((STATIC / "icon.svg").read_bytes()),
        style=style,
        facts=json.dumps(facts, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        runtime=_packed(runtime.module),
        graph=_packed(graph),
        scripts=scripts,
    )


def facts_of(bundle: Bundle, precision: str, runtime: str) -> dict[str, Any]:
    """What the page needs of a bundle besides its graph, as plain JSON values.

    Args:
        bundle: the bundle.
        precision: `int8` or `float32`, of the graph in the page.
        runtime: version of ONNX Runtime Web.
    """
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "digest": bundle.digest,
        "signer": bundle.signer,
        "created": manifest.created.isoformat(),
        "classes": manifest.classes,
        "positive": positive_word(manifest.classes),
        "preprocessing": manifest.preprocessing.model_dump(mode="json", include={"size_px", "fit", "window"}),
        "threshold": manifest.threshold.value,
        "threshold_of": manifest.threshold.site,
        "calibration": manifest.calibration.model_dump(mode="json", include={"slope", "intercept", "lines", "class_lines"}),
        "suitability": _suitability(manifest.suitability),
        "population": {kind: manifest.population.judged(kind) if manifest.population else () for kind in KINDS},
        "card": manifest.card.model_dump(mode="json", include={"phantom", "virtual", "sites", "training_images"}),
        "rules": {
            "max_aspect": MAX_ASPECT,
            "max_colour": MAX_COLOUR,
            "parts": {"chest": sorted(CHEST_PARTS), "other": sorted(OTHER_PARTS)},
        },
        "codes": {"views": [_code(code) for code in VIEW_CODES], "regions": [_code(code) for code in REGION_CODES]},
        "precision": precision,
        "software": f"pneumofed {version('pneumofed')}, ONNX Runtime Web {runtime}",
    }


def _suitability(suitability: Suitability | None) -> dict[str, Any] | None:
    if suitability is None:
        return None
    limits = dict(zip(SUITABILITY_TESTS, suitability.limits.tolist(), strict=True))
    densities = suitability.model_dump(mode="json", include={"features", "pixels", "cells"})
    return {**densities, "limits": {test: limit for test, limit in limits.items() if limit != float("inf")}}


def _code(code: Code) -> dict[str, str]:
    return {"snomed": code.snomed, "legacy": code.legacy, "word": code.word}


def link_scripts(entry: str = "page") -> str:
    """Joins the page's modules, and those of the reading room that they import, to one module without imports.

    Each module becomes a function that returns what it exports; one that is imported stands before those that import it.

    Args:
        entry: name of the module to begin with.

    Raises:
        BundleError: modules import each other in a circle, or one has an import or export of a form that is not known here.
    """
    done: list[str] = []
    linked: list[str] = []

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise BundleError(f"the page's scripts import each other in a circle: {' -> '.join((*path, name))}")
        if name in done:
            return
        text = _source(name)
        for _, _, other in _IMPORT.findall(text):
            add(other, (*path, name))
        done.append(name)
        linked.append(_as_function(name, text))

    add(entry, ())
    return "\n".join(("const modules = {};", *linked))


def _as_function(name: str, text: str) -> str:
    exported = _EXPORT.findall(text)
    body = _IMPORT.sub(lambda found: f"const {_taken(found)} = modules.{found[3]}{'' if found[1] else '.default'};", text)
    body = _DEFAULT.sub("const byDefault = ", _EXPORT.sub("", body))
    if re.search(r"^(?:import|export)\b", body, re.MULTILINE):
        raise BundleError(f"{name}.js imports or exports in a form that the page cannot be made of")
    returned = ["default: byDefault"] if _DEFAULT.search(text) else exported
    return f"modules.{name} = (() => {{\n{body}\nreturn {{ {', '.join(returned)} }};\n}})();"


def _taken(found: re.Match[str]) -> str:
    return f"{{{found[1]}}}" if found[1] else found[2]


def _source(name: str) -> str:
    """The module's text; words are those of this page, and the reading room's for all that it does not say itself."""
    own = STATIC / f"{name}.js"
    if not name.startswith("words_"):
        return (own if own.is_file() else ROOM_STATIC / f"{name}.js").read_text(encoding="utf-8")
    room = {key: text for key, text in read_words(ROOM_STATIC / own.name).items() if key.startswith(ROOM_WORDS)}
    return f"export default {json.dumps(room | read_words(own), ensure_ascii=False)};\n".replace("<", "\\u003c")


def read_words(path: Path) -> dict[str, str]:
    """Reads a table of words: a module that exports one object of texts by default."""
    text = path.read_text(encoding="utf-8")
    body = text[text.index("export default ") + len("export default ") :].rstrip().removesuffix(";")
    table: dict[str, str] = json.loads(re.sub(r",\s*}$", "}", body))
    return table


def _as_global(script: str) -> str:
    """ONNX Runtime's module with its exports as `globalThis.ort`, since a module within a page cannot be imported."""
    text, found = re.subn(r"export\{([^{}]*)\};", _assign, script)
    if found != 1:
        raise BundleError("the script of ONNX Runtime Web exports in a form that is not known here")
    return re.sub(r"^//# sourceMappingURL=.*$", "", text, flags=re.MULTILINE)


def _assign(found: re.Match[str]) -> str:
    pairs = (part.split(" as ") for part in found[1].split(","))
    return f"globalThis.ort={{{','.join(f'{names[-1].strip()}:{names[0].strip()}' for names in pairs)}}};"


def _app(name: str) -> dict[str, Any]:
    """The web application manifest (W3C), by which a browser installs the page."""
    icons = [
        {"src": "icon.svg", "type": "image/svg+xml", "sizes": "any"},
        *(
            {"src": f"icon-{size}.png", "type": "image/png", "sizes": f"{size}x{size}", "purpose": "any maskable"}
            for size in (192, 512)
        ),
    ]
    return {
        "name": f"pneumofed: {name}",
        "short_name": "pneumofed",
        "description": "Pneumonia on a chest radiograph. Research use only; not a medical device.",
        "start_url": PAGE,
        "scope": "./",
        "display": "standalone",
        "background_color": "#0d1013",
        "theme_color": THEME,
        "icons": icons,
    }


def _digest_of(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _integrity(content: bytes) -> str:
    """As Subresource Integrity and Content Security Policy (W3C) write a hash."""
    return f"sha256-{_base64(hashlib.sha256(content).digest())}"


def _packed(content: bytes) -> str:
    return _base64(gzip.compress(content, compresslevel=9, mtime=0))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
