"""Writes the time of every optimizer step of every process to the file that PEERS_STEPS names; the same for all systems, in none of whose
code anything is measured.

Python imports this module at its start where its folder is on PYTHONPATH. It waits for torch and adds nothing where torch is not used.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from types import ModuleType

WATCHED = "torch.optim.optimizer"


def _watch(module: ModuleType) -> None:
    file = os.open(os.environ["PEERS_STEPS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*_: object) -> None:
        os.write(file, f"{time.time():.6f}\n".encode())  # one short write with O_APPEND is whole, whoever else writes

    module.register_optimizer_step_post_hook(note)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_watch(module: ModuleType) -> None:
                run(module)
                _watch(module)

            spec.loader.exec_module = run_and_watch  # type: ignore[method-assign]
        return spec


if "PEERS_STEPS" in os.environ:
    sys.meta_path.insert(0, _Finder())
