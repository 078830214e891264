"""Federated learning across hospitals for pneumonia on chest X-rays: the Python API. See docs/python.md.

read_image(path), read_volume(path)                    a radiograph, and a CT volume in Hounsfield units, as every command reads it
open_bundle("bundle.zip").predict(image)               a finished model's judgement, without torch
explain(bundle, image)                                 where its evidence lies, and whether to believe the map
simulate(hospitals=4, rounds=3), open_run(folder)      a federation of virtual hospitals, and what it left
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pneumofed.images import ArgumentError, Image, PneumofedError, Volume, read_image, read_volume
    from pneumofed.models import Explanation, ImageAnswer, ModelBundle, explain, open_bundle
    from pneumofed.runs import Run, open_run, simulate

    __version__: str

__all__ = [
    "ArgumentError",
    "Explanation",
    "Image",
    "ImageAnswer",
    "ModelBundle",
    "PneumofedError",
    "Run",
    "Volume",
    "__version__",
    "explain",
    "open_bundle",
    "open_run",
    "read_image",
    "read_volume",
    "simulate",
]

_HOMES = {
    "images": ("ArgumentError", "Image", "PneumofedError", "Volume", "read_image", "read_volume"),
    "models": ("Explanation", "ModelBundle", "ImageAnswer", "explain", "open_bundle"),
    "runs": ("Run", "open_run", "simulate"),
}

_HERE = Path(__file__).resolve().parent

if not (_HERE / "common" / "__init__.py").is_file():
    if not (_HERE.parent / "common" / "__init__.py").is_file() or any(
        (_HERE / house).is_file() for house in ("client", "common")
    ):
        raise ImportError(
            f"{_HERE / 'common'} is no folder: in the repository it is a link to ../common, which this file system or git did not "
            "make. Clone where symbolic links work (on Windows: git config core.symlinks true), or `pip install` a wheel."
        )
    __path__ = [*__path__, str(_HERE.parent)]  # `flwr build` leaves links out and puts the folders beside this one

if not TYPE_CHECKING:  # a type checker would take a function of this name as leave to use any name

    def __getattr__(name: str) -> object:
        """Imports what is asked for when it is asked for (PEP 562), so that `import pneumofed` costs nothing."""
        if name == "__version__":
            from importlib.metadata import version

            return globals().setdefault(name, version("pneumofed"))
        for home, names in _HOMES.items():
            if name in names:
                return globals().setdefault(name, getattr(import_module(f".{home}", __name__), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
