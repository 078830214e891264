"""What the two Flower apps may import: the federated code alone. Reports, figures and templates belong to who closes a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APPS = ("pneumofed.client.app", "pneumofed.server.app")
OURS = ("client", "common", "server", "simulation")
FORBIDDEN = (
    "pneumofed.server.report.report",
    "pneumofed.common.ops.render",
    "pneumofed.common.evaluation.plots",
    "pneumofed.common.evaluation.plots",
    "matplotlib",
    "jinja2",
)


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((found for found in (path / "__init__.py", path.with_suffix(".py")) if found.is_file()), None)


def imported(module: str) -> Iterator[str]:
    """Every module that `module` names in an import, those inside functions too."""
    path = file_of(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closure(roots: tuple[str, ...]) -> dict[str, str]:
    """Each module that `roots` can come to import, ours and others', with the one that imports it."""
    found, left = dict.fromkeys(roots, ""), list(roots)
    while left:
        importer = left.pop()
        for name in imported(importer):
            parts = name.split(".")
            for module in (".".join(parts[: length + 1]) for length in range(len(parts))):
                if module not in found and (parts[0] not in OURS or file_of(module)):
                    found[module] = importer
                    left += [module] if parts[0] in OURS else []
    return found


def test_the_closure_of_the_apps_holds_no_report() -> None:
    found = closure(APPS)
    assert {
        "pneumofed.server.federation.run",
        "pneumofed.client.federation.training",
        "pneumofed.common.config.experiment",
        "torch",
    } <= found.keys()  # it was walked at all
    assert not {name: importer for name, importer in found.items() if name.startswith(FORBIDDEN)}


def test_the_apps_imported_in_a_fresh_process_bring_no_report() -> None:
    code = (
        "import sys, pneumofed.client.app, pneumofed.server.app\n"
        f"ours = tuple(name for name in {FORBIDDEN} if '.' in name)\n"
        "print(sorted(name for name in sys.modules if name.startswith(ours)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
