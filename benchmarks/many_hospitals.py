"""Peak memory of a simulation with many hospitals: the sum over all its processes, sampled twice a second.

    python -m benchmarks.many_hospitals --hospitals 100 --image-size 64 --rounds 2

Proportional set size (/proc/PID/smaps_rollup), so that pages which processes share count once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pneumofed.common.ops.processes import descendants


def memory_mib(pids: set[int]) -> float:
    total = 0
    for pid in pids:
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hospitals", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable,
            "-m",
            "pneumofed.cli.main",
            "simulate",
            "--hospitals",
            str(options.hospitals),
            "--partition",
            "iid",
        ]
        command += ["--image-size", str(options.image_size), "--rounds", str(options.rounds), "--out", f"{name}/run"]
        command += [part for value in options.set for part in ("--set", value)]
        command += ["--data", options.data] if options.data else []
        process, samples = subprocess.Popen(command, env={**os.environ}), []
        while process.poll() is None:
            samples.append(memory_mib({process.pid, *descendants(process.pid)}))
            time.sleep(0.5)
    print(f"exit {process.returncode}  peak {max(samples):.0f} MiB over {len(samples)} samples  hospitals {options.hospitals}")


if __name__ == "__main__":
    main()
