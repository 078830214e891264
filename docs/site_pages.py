"""Pages of the documentation site that are no Markdown file below docs/: notebooks, and files of the repository that pages link to.

Every link is written as GitHub reads it, relative to the file that it stands in. On the site a notebook is a page of its own, and a file
outside docs/ (README.md, a configuration, a test) becomes a page below `repository/`, so that the same link works on both and the site
stays whole without a network. MkDocs calls the functions that begin with `on_` (`hooks` in mkdocs.yml). With PNEUMOFED_DOCS_EXECUTE=1 the
notebooks run while the site is built, and their pages show what came out.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^(?:```.*?^```|~~~.*?^~~~)|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml", ".json": "json", ".sh": "bash"}
"""What a file outside docs/ is coloured as; all others are plain text."""
log = logging.getLogger("mkdocs.hooks.site_pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook and for each file outside docs/ that a page leads to, over as many links as it takes.

    Args:
        files: of docs/.
        config: of the site.
    """
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        page, pictures = notebook_page(ROOT / "docs" / file.src_uri)
        files.append(File.generated(config, page_name(f"docs/{file.src_uri}"), content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, join(dirname(file.src_uri), name), content=picture))
    written = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path in outside_docs(written):
        text = repository_page(path)
        files.append(File.generated(config, page_name(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with its links as the site needs them.

    Args:
        markdown: of the page.
        page: where it stands.
        config: of the site.
        files: of the site.
    """
    return rewrite_links(markdown, source_path(page.file.src_uri))


def page_name(path: str) -> str:
    """Returns where the site has the file of the repository at `path`, as MkDocs names its pages."""
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return inside.removesuffix(".ipynb") + ".md" if inside.endswith(".ipynb") else inside
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def source_path(name: str) -> str:
    """Returns the path in the repository of the page `name`: what its links are relative to."""
    if not name.startswith("repository/"):
        return f"docs/{name}"
    path = name.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def link_targets(markdown: str, source: str) -> Iterator[str]:
    """Yields the paths in the repository that the links of a page lead to.

    Args:
        markdown: of the page.
        source: its path in the repository.
    """
    for part in CODE.split(markdown):
        for match in LINK.finditer(part):
            if not re.match(r"[a-z]+:", match[2]):
                yield normpath(join(dirname(source), match[2]))


def outside_docs(pages: dict[str, str]) -> list[str]:
    """Returns the files outside docs/ that the pages lead to, and those that their Markdown files lead to, and so on.

    Args:
        pages: text of each page by its path in the repository.
    """
    found: list[str] = []
    waiting = [target for path, text in pages.items() for target in link_targets(text, path)]
    while waiting:
        target = waiting.pop()
        if target.startswith("docs/") or target in found:
            continue
        if not (ROOT / target).is_file():
            log.warning("a link leads to %s, which is no file of the repository: name a file, not a folder", target)
            continue
        found.append(target)
        if target.endswith(".md"):
            waiting += link_targets((ROOT / target).read_text(encoding="utf-8"), target)
    return sorted(found)


def repository_page(path: str) -> str:
    """Returns the page of the file at `path`: Markdown as it stands, anything else as code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n````\n"


def rewrite_links(markdown: str, source: str) -> str:
    """Returns the page with each link outside code pointing at the site's page of the file.

    Args:
        markdown: of the page, with links relative to `source`.
        source: its path in the repository.
    """
    here = dirname(page_name(source)) or "."

    def rewritten(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups(default="")
        if re.match(r"[a-z]+:", target) or target.startswith("/"):
            return match[0]
        return opening + relpath(page_name(normpath(join(dirname(source), target))), here) + anchor + closing

    return outside_code(markdown, lambda text: LINK.sub(rewritten, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Returns the text with `change` applied to all of it but code.

    Args:
        markdown: with fenced blocks and code in lines.
        change: of a piece of text.
    """
    pieces, end = [], 0
    for code in CODE.finditer(markdown):
        pieces += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, change(markdown[end:])])


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns the Markdown of a notebook, and its pictures by name.

    Args:
        path: of the notebook, stored without outputs.
    """
    notebook = nbformat.read(path, as_version=4)
    executed = os.environ.get("PNEUMOFED_DOCS_EXECUTE") == "1"
    if executed:
        execute(notebook)
    pictures: dict[str, bytes] = {}
    cells = list(_cells(notebook.cells, path.stem, pictures))
    shown = "with what came out of it" if executed else "without its outputs"
    note = f'*This page is the notebook <a href="{path.name}" download>{path.name}</a>, {shown}. The test suite executes it.*'
    heading, _, rest = cells[0].partition("\n")
    return "\n\n".join([heading, note, rest.strip(), *cells[1:]]) + "\n", pictures


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs the notebook in a folder of its own, which is gone afterwards, and leaves its outputs in it."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "TMPDIR": folder})  # so that folders that the notebook makes are gone too
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                _forget_folder(output, folder)


def _forget_folder(output: Any, folder: str) -> None:
    if "text" in output:
        output["text"] = output["text"].replace(folder, "~")
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str):
            output["data"][kind] = value.replace(folder, "~")


def _cells(cells: Iterable[Any], stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """Yields each cell as Markdown; pictures go into `pictures`, since a page names them as files."""
    for cell in cells:
        if cell.cell_type == "markdown":
            yield cell.source
            continue
        yield f"````python\n{cell.source}\n````"
        shown = [_output(one, stem, pictures) for one in _joined(cell.outputs)]
        if any(shown):
            yield '<div class="output" markdown="block">\n\n' + "\n\n".join(filter(None, shown)) + "\n\n</div>"


def _joined(outputs: Iterable[Any]) -> list[Any]:
    """The outputs, what was printed in pieces as one. Rich, which prints for the commands, gives each line to Jupyter as HTML."""
    found: list[Any] = []
    for output in outputs:
        if output.get("data", {}).get("text/html", "").startswith("<pre"):
            output = nbformat.v4.new_output("stream", name="stdout", text=output.data["text/plain"])
        if found and output.output_type == "stream" and found[-1].output_type == "stream":
            found[-1] = nbformat.from_dict({**found[-1], "text": found[-1].text + output.text})
        else:
            found.append(output)
    return found


def _output(output: Any, stem: str, pictures: dict[str, bytes]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        name = f"{stem}-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![Output of the cell above]({name})"
    if "text/html" in data:  # a link to a file of the machine that ran it leads nowhere
        return re.sub(r'<a href="file:[^"]*">(.*?)</a>', "", data["text/html"])
    text = data.get("text/plain", "").rstrip()
    return f"````text\n{text}\n````" if text else ""
