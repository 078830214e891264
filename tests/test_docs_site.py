"""The documentation as a site: it builds without a warning or a network, its links are those of GitHub, and its notebooks run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

import pneumofed

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(
    bool(MISSING),
    reason=f"the site is built by mkdocs-material and mkdocstrings, which are not here ({MISSING}): pip install '.[docs]'",
)
TERMS = (
    "app bundle", "audit log", "AUROC", "calibration", "cannot judge", "code gate", "coordinator", "delta", "differential privacy",
    "dossier", "drift", "enrolment", "epsilon", "external set", "gateway", "held-out set", "kit", "ledger", "lineage", "manifest",
    "model bundle", "phantom", "policy", "population", "preflight", "reading room", "reference", "release gate", "roster", "round",
    "run folder", "secure aggregation", "site folder", "hidden cell", "strategy", "SuperLink", "SuperNode", "survey", "threshold",
    "unit", "update",
)  # fmt: skip
"""Words that the pages use as if everybody knew them."""


@dataclass
class Read(HTMLParser):
    """What a page of the site loads, where its links go, and where they may land."""

    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "iframe", "source", "video", "object", "embed") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values.get("href", ""))


def read_page(path: Path) -> Read:
    page = Read()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built by the command; whatever would ask the network meets a proxy that is not there."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "PNEUMOFED_DOCS_EXECUTE": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """`docs/site_pages.py`, which MkDocs loads as a hook."""
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> dict[str, Any]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return {name: page for entry in yaml.safe_load(text.partition("\nnav:\n")[2]) for name, page in entry.items()}


def github_anchor(heading: str) -> str:
    """As GitHub makes it of a heading: lower case, no punctuation, a hyphen for each blank."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@needs_mkdocs
def test_the_site_is_built_without_a_warning_and_without_a_network(site: Path) -> None:
    sources = {path.stem for path in DOCS.glob("*.md")}
    assert sources <= {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (site / "notebooks").glob("*.html")}
    assert not list(site.rglob("*.py"))


@needs_mkdocs
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = {load for path in site.rglob("*.html") for load in read_page(path).loads}
    assert len(loaded) > 10
    assert not [load for load in loaded if re.match(r"(?:[a-z]+:)?//", load)]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", styles)


@needs_mkdocs
def test_the_search_works_from_a_file_and_knows_every_page(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    found = {entry["location"].partition("#")[0] for entry in json.loads(index.removeprefix("var __index = "))["docs"]}
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} <= found
    assert {f"notebooks/{path.stem}.html" for path in NOTEBOOKS} <= found
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


@needs_mkdocs
def test_every_link_of_the_site_lands(site: Path) -> None:
    read = {path.resolve(): read_page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in read.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                assert link.startswith(("https://", "http://", "mailto:")), link
                continue
            place = (path.parent / target).resolve() if target else path
            if not place.is_file() or (anchor and place in read and anchor not in read[place].ids | {"__skip"}):
                broken.append((path.name, link))
    assert not broken


@needs_mkdocs
def test_a_heading_has_the_anchor_that_github_gives_it(site: Path) -> None:
    checked = 0
    for path in DOCS.glob("*.md"):
        ids, seen = read_page(site / f"{path.stem}.html").ids, set[str]()
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
            anchor = github_anchor(heading)
            assert anchor in seen or anchor in ids, (path.name, heading)
            seen.add(anchor)
            checked += 1
    assert checked > 150


def test_every_link_of_the_pages_leads_to_a_file_as_github_reads_it() -> None:
    wrong = []
    for path in [*DOCS.glob("*.md"), *NOTEBOOKS, *ROOT.glob("*.md")]:
        text = re.sub(r"^```.*?^```|`[^`\n]+`", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        targets = [target for target in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", target)]
        wrong += [(path.name, target) for target in targets if not (path.parent / target).is_file()]
    assert not wrong


@needs_mkdocs
def test_a_file_outside_the_pages_becomes_a_page(site: Path) -> None:
    readme = read_page(site / "repository" / "index.html")  # as MkDocs names a README
    assert "../site.html" in readme.links and "CONTRIBUTING.html" in readme.links and "../images/report.png" in readme.loads
    assert "repository/index.html" in read_page(site / "index.html").links
    assert "cff-version" in (site / "repository" / "CITATION.cff.html").read_text(encoding="utf-8")


@needs_mkdocs
def test_links_are_written_anew_and_code_is_not(pages: ModuleType) -> None:
    text = "[a](../README.md#b) [c](site.md#d) [n](notebooks/x.ipynb) [y](../configs/kaggle.yaml) [o](https://x.org) `[k](../k.md)`\n"
    fence = "```\n[in](../code.md)\n```\n"
    assert pages.rewrite_links(text + fence, "docs/page.md") == (
        "[a](repository/README.md#b) [c](site.md#d) [n](notebooks/x.md) [y](repository/configs/kaggle.yaml.md) "
        "[o](https://x.org) `[k](../k.md)`\n" + fence
    )
    assert pages.rewrite_links("[p](docs/site.md) [q](LICENSE)", "README.md") == "[p](../site.md) [q](LICENSE.md)"
    assert pages.rewrite_links("[p](../../SECURITY.md)", "docs/notebooks/n.ipynb") == "[p](../repository/SECURITY.md)"


@needs_mkdocs
def test_a_link_to_what_is_no_file_is_a_warning_and_so_ends_a_strict_build(
    pages: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    assert pages.outside_docs({"docs/page.md": "[a](../configs) [b](../nothing.md) [c](../LICENSE)"}) == ["LICENSE"]
    assert {record.getMessage().split()[4].rstrip(",") for record in caplog.records} == {"configs", "nothing.md"}


@needs_mkdocs
def test_a_notebook_shows_what_came_out_and_no_place_of_the_machine(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\ntext"), nbformat.v4.new_code_cell("shown")])
    nbformat.write(book, tmp_path / "book.ipynb")
    plain, _ = pages.notebook_page(tmp_path / "book.ipynb")
    assert plain.startswith("# Title\n") and "without its outputs" in plain and "<b>html</b>" not in plain

    class Ran:
        """A client that leaves what a kernel would."""

        def __init__(self, notebook: nbformat.NotebookNode, resources: Any, **_: Any) -> None:
            self.notebook, self.folder = notebook, resources["metadata"]["path"]

        def execute(self, **_: Any) -> None:
            page = f'<b>html</b><a href="file://{self.folder}/r.html">report</a>'
            output = nbformat.v4.new_output
            self.notebook.cells[1].outputs = [
                output("stream", name="stdout", text="one\n"),
                output("stream", name="stdout", text=f"{self.folder}/x\n"),
                output("execute_result", data={"text/html": page}, execution_count=1),
                output("display_data", data={"image/png": "iVBORw0="}),
            ]

    monkeypatch.setenv("PNEUMOFED_DOCS_EXECUTE", "1")
    monkeypatch.setattr("nbclient.NotebookClient", Ran)
    shown, pictures = pages.notebook_page(tmp_path / "book.ipynb")
    assert "````text\none\n~/x\n````" in shown and "<b>html</b>" in shown and "file:" not in shown
    assert pictures == {"book-1.png": b"\x89PNG\r"} and "](book-1.png)" in shown


def test_the_pages_are_grouped_by_who_reads_them_and_each_reader_begins_with_a_notebook() -> None:
    groups = navigation()
    assert list(groups) == ["Home", "Researcher", "Hospital engineer", "Coordinator", "Radiologist", "Reference"]
    first = [next(iter(groups[name][0].values())) for name in ("Researcher", "Hospital engineer", "Coordinator", "Radiologist")]
    assert sorted(Path(page).stem for page in first) == [path.stem for path in NOTEBOOKS]
    home = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(page.replace(".md", ".ipynb") in home for page in first)


@needs_mkdocs
def test_the_reference_has_every_public_name_with_its_docstring(site: Path) -> None:
    page = site / "api.html"
    ids, text = read_page(page).ids, page.read_text(encoding="utf-8")
    assert {f"pneumofed.{name}" for name in pneumofed.__all__ if name != "__version__"} <= ids
    assert {"pneumofed.ModelBundle.predict", "pneumofed.Run.export"} <= ids
    assert "once its signature and every file of it were checked" in text


def glossary() -> dict[str, tuple[str, str]]:
    """(explanation, page that is linked) of each term."""
    found: dict[str, tuple[str, str]] = {}
    for line in (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines():
        if entry := re.fullmatch(r"- (\*\*.+?\*\*(?:, \*\*.+?\*\*)*): (.+) \[.+?\]\((\S+?)\)", line):
            found |= dict.fromkeys(re.findall(r"\*\*(.+?)\*\*", entry[1]), (entry[2], entry[3]))
        assert entry or not line.startswith("-"), line
    return found


def test_the_glossary_has_the_words_that_the_pages_use() -> None:
    everything = " ".join(path.read_text(encoding="utf-8").lower() for path in DOCS.glob("*.md") if path.stem != "glossary")
    assert not [term for term in TERMS if term.lower() not in everything], "a term that no page uses"
    assert not set(TERMS) - set(glossary())


@pytest.mark.parametrize("term", sorted(glossary()))
def test_a_term_is_one_or_two_sentences_and_its_page_uses_it(term: str) -> None:
    explanation, link = glossary()[term]
    assert len(re.findall(r"[.!?](?:\s|$)", explanation.replace("e.g.", "eg"))) <= 2
    page, _, anchor = link.partition("#")
    text = (DOCS / page).read_text(encoding="utf-8")
    stem = term.lower().rstrip("y")  # canary, canaries
    assert stem in " ".join(text.lower().split())
    headings = {github_anchor(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert not anchor or anchor in headings


def test_the_comparison_names_the_versions_that_are_here() -> None:
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert f"Flower {pins['flwr'].rpartition('.')[0]} |" in text
    assert f"| pneumofed {pneumofed.__version__.rpartition('.')[0]} |" in text
    sources = text.partition("## What was read")[2]
    for project in ("NVFlare", "Flower", "FLIP", "FL4Health"):
        assert re.search(rf"^\| {project} \|.*`[0-9a-f]{{9}}`", sources, re.MULTILINE), project


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_a_machine_leaves(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count") and not cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def run_cells(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a notebook of plain Python leaves when it runs in this process: its names, and how its cells' last values show."""
    names, shown = dict[str, Any](), list[str]()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(repr(eval(compile(ast.Expression(last.value), path.name, "eval"), names)))
    return names, shown


def test_the_hospitals_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names, shown = run_cells(DOCS / "notebooks" / "hospital_site.ipynb")
    text = capsys.readouterr().out
    assert "12" in shown and "'succeeded'" in shown  # preflight without a coordinator, and the round
    assert "withheld: training_metrics" in text and "train_loss" not in text
    assert "query refused by the rule max_epsilon" in text and "6 lines, unbroken" in text
    patients = {row.split(",")[1] for row in Path("north/data/manifest.csv").read_text().splitlines()[1:]}
    assert len(patients) == 60 and not any(patient in names["log"].read_text() for patient in patients)


def execute_in_a_kernel(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, set[str]]:
    """(text of what was printed or shown, kinds of it) of a notebook, as Jupyter runs it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(folder))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning of a library"
    shown = [output.get("data", {}) for output in outputs]
    text = [output.get("text", "") + data.get("text/plain", "") for output, data in zip(outputs, shown, strict=True)]
    return "".join(text), {kind for data in shown for kind in data}


@pytest.mark.slow
def test_the_coordinators_notebook_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, kinds = execute_in_a_kernel(DOCS / "notebooks" / "coordinator_study.ipynb", tmp_path, monkeypatch)
    assert "3 hospitals answered" in text and "north, river " in text and "rule=strategies" in text and "text/html" in kinds
    assert list(tmp_path.glob("*/kits/coordinator/runs/first/report.html"))


@pytest.mark.slow
def test_the_radiologists_notebook_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, kinds = execute_in_a_kernel(DOCS / "notebooks" / "radiologist_image.ipynb", tmp_path, monkeypatch)
    assert "cannot judge: a picture in colour" in text and "no frontal view" in text and "image/png" in kinds
    assert "new case: " in text and "anna says normal" in text and "case-added" in text


@pytest.mark.slow
def test_the_hospitals_notebook_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, _ = execute_in_a_kernel(DOCS / "notebooks" / "hospital_site.ipynb", tmp_path, monkeypatch)
    assert "query refused by the rule max_epsilon" in text
