"""Networks and losses of a study, as files that tests write."""

from __future__ import annotations

from pathlib import Path

NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=2, in_channels=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        )
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.drop(self.body(x).mean(dim=(2, 3))))


def build_net(classes, in_channels):
    return Net(classes, in_channels)
"""
LOSS = """
from torch import nn


def build_loss(classes):
    return nn.CrossEntropyLoss(label_smoothing=0.1)
"""
BAD: dict[str, tuple[str, str]] = {
    "no function": ("x = 1\n", "net.py defines no function or class build; it defines nothing"),
    "no Python": ("def build(:\n", "net.py, line 1: no Python: invalid syntax"),
    "raises on import": (
        "1 / 0\ndef build(): ...\n",
        "net.py raises ZeroDivisionError: division by zero (line 1) when it is imported",
    ),
    "ends the process": ("raise SystemExit(3)\ndef build(): ...\n", "net.py raises SystemExit: 3 (line 1) when it is imported"),
    "not installed": (
        "import no_such_package\ndef build(): ...\n",
        "net.py imports no_such_package, which is not installed here",
    ),
    "file beside it": ("import beside\ndef build(): ...\n", "net.py imports beside, a file beside it"),
    "relative": ("from . import other\ndef build(): ...\n", "net.py imports a file beside it"),
    "only imported": ("from os import system as build\n", "net.py defines no function or class build"),
    "no network": ("def build(): return 7\n", "net.py:build returns int, expected a network (torch.nn.Module)"),
    "raises": ("def build(): return [][0]\n", "net.py:build raises IndexError: list index out of range (line 1)"),
    "other arguments": (
        "def build(depth, classes): ...\n",
        "net.py:build needs depth; it is called with classes, num_classes, in_channels: give the others a default",
    ),
    "no parameters": ("from torch import nn\ndef build(): return nn.Flatten()\n", "the network has no parameters"),
    "wrong number of logits": (
        "from torch import nn\ndef build(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))\n",
        "of 2 images the network gives [2, 3], expected logits [2, 2]",
    ),
    "no tensor": (
        "from torch import nn\nclass build(nn.Linear):\n"
        "    def __init__(self): super().__init__(1, 2)\n    def forward(self, x): return {}\n",
        "of 2 images the network gives dict, expected logits [2, 2]",
    ),
    "no image fits": (
        "from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(5, 2, 3), nn.Flatten(), nn.Linear(2, 2))\n",
        "the network raises RuntimeError: Given groups=1, weight of size [2, 5, 3, 3]",
    ),
    "a view that needs another order": (
        "from torch import nn\nclass build(nn.Module):\n"
        "    def __init__(self): super().__init__(); self.c = nn.Conv2d(1, 2, 3, 4); self.f = nn.Linear(2048, 2)\n"
        "    def forward(self, x): return self.f(self.c(x).view(len(x), -1))\n",
        "the network raises RuntimeError: view size is not compatible",
    ),
    "no linear classifier": (
        "from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n",
        "the logits are not the output of an nn.Linear on features [N, D]",
    ),
    "lazy": (
        "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))\n",
        "1.weight has no shape before the first image (a lazy layer)",
    ),
    "float64": (
        "from torch import nn\ndef build(): return nn.Linear(4, 2).double()\n",
        "weight is float64; weights travel as float32",
    ),
    "starts a run": (
        "import pneumofed\npneumofed.simulate(model='net.py:build')\ndef build(): ...\n",
        "net.py starts a run when it is imported for its network",
    ),
}
"""Sources of a `net.py`, and what is said of `net.py:build`."""


def write(folder: Path, source: str = NETWORK, name: str = "net.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(source)
    return folder / name
