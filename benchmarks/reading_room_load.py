"""Fifty readers at once: errors and latency of a real reading-room server, asked by wrk.

    python -m benchmarks.reading_room_load --connections 50 --seconds 20 [--bundle BUNDLE] [--images FOLDER]
    python -m benchmarks.reading_room_load --against ../former --turns 5      # beside another checkout's server
    python -m benchmarks.reading_room_load --series 64 300 [--bundle BUNDLE]  # CT: from the upload to the first slice

The server is the command `pneumofed reading-room start` on loopback with its own worker processes; without `--bundle` the model is the
small one of the tests, without `--images` the images are phantoms of 2,000 x 2,000 pixels. With `--series`, in place of all else, a
drawn thorax of 512 x 512 voxels in so many slices with the noise of a scanner is sent as the files of a DICOM series, as one zip and as
`.nii.gz` to a room with a CT model, by one reader: seconds from the first byte sent to the answer, to the case with its first slice, and
for each of twenty slices with its map. Without it all kinds of requests are first mixed as a reader sends them, then each is measured
alone. Every connection sends its next request as soon as the answer came, so fifty connections are more than fifty people. Exit code 1 if
any request failed. A map is asked for only of cases that have one.

Against another checkout both servers run, with a bundle that the other makes where none is given (a later version reads earlier bundles).
Each kind of request is measured at one, then at the other, `--turns` times; the ratio is the median over turns of median latency / the
other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import yaml

from pneumofed.common.ops.processes import free_port
from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.simulation.phantoms.ct_sets import draw_ct, encode_series, write_nifti
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture
from pneumofed.simulation.phantoms.scanners import Examination
from pneumofed.simulation.phantoms.thorax import VoxelGrid
from tests.dicom_factory import dicom_bytes
from tests.model_bundles import make_bundle
from tests.volume_bundles import make_volume_bundle

PASSWORD = "a long pass phrase"
COMMAND = [sys.executable, "-m", "pneumofed.cli.main", "reading-room"]
LUA = """
local requests = {}
local at = 0
for line in io.lines("REQUESTS") do
  local method, path, body = line:match("^(%S+) (%S+) ?(.*)$")
  local content = nil
  if body ~= "" then
    local file = io.open(body, "rb"); content = file:read("*a"); file:close()
  end
  table.insert(requests, {method, path, content})
end
local headers = {HEADERS}
request = function()
  at = at % #requests + 1
  local chosen = requests[at]
  return wrk.format(chosen[1], chosen[2], headers, chosen[3])
end
done = function(summary, latency, _)
  local e = summary.errors
  io.stderr:write(string.format('{"requests": %d, "seconds": %.3f, "failed": %d, "p50_ms": %.1f, "p99_ms": %.1f, "max_ms": %.1f}\\n',
    summary.requests, summary.duration / 1e6, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


@dataclass(frozen=True)
class Stage:
    """A running server, a reader's headers, and its cases."""

    address: str
    headers: Mapping[str, str]
    cases: list[str]
    with_map: list[str]


def images(folder: Path | None, count: int) -> list[bytes]:
    """`count` files: from `folder`, or phantoms of 4 million pixels as DICOM."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.rglob("*.jp*g"))[:count]]
    found = []
    for number, patient in enumerate(draw_patients("train", count, 0)):
        pixels = draw_picture(patient, 1, "train", 0, 500)
        wide = PIL.Image.fromarray(np.rint(pixels * 4095).astype(np.float32)).resize((2000, 2000), PIL.Image.Resampling.BILINEAR)
        found.append(dicom_bytes(np.asarray(wide).astype(np.uint16), BitsStored=12, PatientID=f"P{number}"))
    return found


@contextmanager
def server(folder: Path, bundle: Path, files: list[bytes], workers: int, checkout: Path | None = None) -> Iterator[Stage]:
    """A room with a case for each of `files`, served by a process of its own, with the code in `checkout` or the installed one."""
    folder.mkdir()
    room, port = folder / "room", free_port()
    code = {"PYTHONPATH": str(checkout.resolve())} if checkout else {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | code
    init = [*COMMAND, "init", str(room), "--bundle", str(bundle)]
    subprocess.run(init, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    settings = yaml.safe_load((room / "room.yaml").read_text()) | {"port": port, "workers": workers}
    (room / "room.yaml").write_text(yaml.safe_dump(settings))
    add = [*COMMAND, "user", "add", "reader", "--password-stdin", "-C", str(room)]
    subprocess.run(add, check=True, input=PASSWORD, text=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    process = subprocess.Popen([*COMMAND, "start", "-C", str(room)], stdout=subprocess.DEVNULL, env=environment, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=address, timeout=120.0, trust_env=False) as client:
            _wait_until_ready(client, process)
            login = client.post("/api/login", json={"user": "reader", "password": PASSWORD})
            headers = {CSRF_HEADER: login.json()["csrf"], "Cookie": "; ".join(f"{c.name}={c.value}" for c in client.cookies.jar)}
            started = time.perf_counter()
            done = [_upload(client, headers, file) for file in files]
            if files:
                print(f"uploaded one after the other: {1000 * (time.perf_counter() - started) / len(files):.0f} ms an image")
            with_map = [case for case in done if client.get(f"/api/cases/{case}/map").status_code == 200]
        yield Stage(address, headers, done, with_map)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit("the server ended at once")
        try:
            if client.get("/api/health").json()["ready"]:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not get ready")


def _upload(client: httpx.Client, headers: Mapping[str, str], file: bytes) -> str:
    answer = client.post("/api/cases", files={"files": ("x", file)}, headers={CSRF_HEADER: headers[CSRF_HEADER]})
    return str(answer.json()["files"][0]["case"])


def scenarios(stage: Stage, folder: Path, files: list[bytes]) -> dict[str, list[str]]:
    """Lines of `METHOD PATH [file with the body]` by name."""
    bodies = {"worklist": {"limit": 50}, "next": {"after": stage.cases[0]}, "finding": {"label": "normal"}}
    for name, body in bodies.items():
        (folder / name).write_text(json.dumps(body))
    for number, file in enumerate(files):
        (folder / f"image{number}").write_bytes(file)
    small = folder / "small.png"
    buffer = BytesIO()
    PIL.Image.fromarray((np.indices((224, 224)).sum(axis=0) % 256).astype(np.uint8)).save(buffer, "PNG")
    small.write_bytes(buffer.getvalue())
    found = {
        "worklist": [f"POST /api/worklist {folder / 'worklist'}"],
        "case": [f"GET /api/cases/{case}" for case in stage.cases],
        "pixels": [f"GET /api/cases/{case}/pixels" for case in stage.cases],
        "image 1024 px": [f"GET /api/cases/{case}/image.png?max_side=1024" for case in stage.cases],
        "map": [f"GET /api/cases/{case}/map.png" for case in stage.with_map],
        "predict, 224 px PNG": [f"POST /api/predict {small}"],
        "predict, as uploaded": [f"POST /api/predict {folder / f'image{number}'}" for number in range(len(files))],
    }
    found["finding"] = [f"POST /api/cases/{case}/findings {folder / 'finding'}" for case in stage.cases]
    steps = ("worklist", "case", "image 1024 px", "map", "finding", "predict, 224 px PNG")
    found = {name: lines for name, lines in found.items() if lines}
    mixture = [found[step][number % len(found[step])] for number in range(len(stage.cases)) for step in steps if step in found]
    return {"a reader's mixture": mixture, **found}


def measure(stage: Stage, lines: list[str], folder: Path, connections: int, seconds: int) -> dict[str, Any]:
    """What wrk says of the requests in `lines`, asked in turn over each of `connections`."""
    (folder / "requests").write_text("\n".join(lines) + "\n")
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip", **stage.headers}
    table = ", ".join(f"[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items())
    script = folder / "script.lua"
    script.write_text(LUA.replace("REQUESTS", str(folder / "requests")).replace("{HEADERS}", "{" + table + "}"))
    threads = str(min(2, connections, os.cpu_count() or 1))
    command = [
        "wrk",
        "-t",
        threads,
        "-c",
        str(connections),
        "-d",
        f"{seconds}s",
        "--timeout",
        "60s",
        "-s",
        str(script),
        stage.address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return result


def draw_series(slices: int, seed: int, folder: Path) -> dict[str, list[bytes]]:
    """A drawn thorax of 512 x 512 voxels a slice with 25 HU of noise, by way in; `seed` makes other noise, which is another series.

    Args:
        slices: of the series.
        seed: of the noise.
        folder: for the NIfTI file.
    """
    grid, coarse = VoxelGrid(slices, 512, 512), VoxelGrid(32, 128, 128)
    small = draw_ct(next(iter(draw_patients("test", 1, 0))), "test", 0, coarse)
    noise, planes = np.random.default_rng(seed), np.linspace(0, 31, slices).round().astype(int)
    volume = np.empty(grid.shape, np.int16)
    for place, plane in enumerate(planes):
        wide = PIL.Image.fromarray(small[plane].astype(np.float32)).resize((512, 512), PIL.Image.Resampling.BILINEAR)
        volume[place] = np.clip(np.asarray(wide) + noise.normal(0, 25, (512, 512)), -1024, 3071)
    known: dict[str, Any] = {
        "manufacturer": "Phantom",
        "is_drawn": True,
        "patient": f"B{slices}-{seed}",
        "sex": "F",
        "age_years": 50.0,
    }
    files = list(encode_series(volume, grid, Examination(f"bench {slices} {seed}", **known)))
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, file in enumerate(encode_series(volume, grid, Examination(f"zip {slices} {seed}", **known))):
            archive.writestr(f"{number}.dcm", file)
    write_nifti(volume, grid, folder / "volume.nii.gz")
    return {"files": files, "zip": [buffer.getvalue()], "nii.gz": [(folder / "volume.nii.gz").read_bytes()]}


def time_series(options: argparse.Namespace, folder: Path) -> None:
    """Prints what a reader waits for, for each number of slices and each way in; the median of `--turns` series."""
    bundle = options.bundle or make_volume_bundle(folder / "bundle")
    with server(folder / "ct", bundle, [], options.workers, Path(__file__).parents[1]) as stage:
        headers = {CSRF_HEADER: stage.headers[CSRF_HEADER], "Cookie": stage.headers["Cookie"]}
        with httpx.Client(base_url=stage.address, headers=headers, timeout=600.0, trust_env=False) as client:
            for slices in options.series:
                turns = [draw_series(slices, seed, folder) for seed in range(options.turns)]
                for way in turns[0]:
                    found = [_time_one(client, turn[way], slices) for turn in turns]
                    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
                    print(
                        json.dumps({"slices": slices, "way": way, **{name: round(value, 3) for name, value in medians.items()}}),
                        flush=True,
                    )


def _time_one(client: httpx.Client, files: list[bytes], slices: int) -> dict[str, float]:
    started = time.perf_counter()
    answer = client.post("/api/cases", files=[("files", ("image", file)) for file in files]).json()["files"]
    answered = time.perf_counter()
    case = answer[0]["case"]
    client.get(f"/api/cases/{case}").raise_for_status()
    size = len(client.get(f"/api/cases/{case}/pixels").raise_for_status().content)
    shown = time.perf_counter()
    places = np.linspace(1, slices, 20).astype(int).tolist()
    each = []
    for place in places:
        before = time.perf_counter()
        for what in ("pixels", "map"):
            client.get(f"/api/cases/{case}/{what}", params={"slice": place})
        each.append(time.perf_counter() - before)
    return {
        "mib": sum(map(len, files)) / 2**20,
        "answer_sec": answered - started,
        "first_slice_sec": shown - started,
        "next_slice_sec": statistics.median(each),
        "slice_kib": size / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=8, help="cases in the room")
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=20, help="for each kind of request")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="of another version: compares the two servers")
    parser.add_argument("--turns", type=int, default=5, help="with --against and --series")
    parser.add_argument("--series", type=int, nargs="+", metavar="SLICES", help="CT series of so many slices, and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.series:
            time_series(options, folder)
            return
        bundle = options.bundle or test_bundle(folder / "bundle", options.against)
        files = images(options.images, options.count)
        if options.against:
            failed = compare(options, folder, bundle, files)
        else:
            with server(folder / "ours", bundle, files, options.workers) as stage:
                failed = load(options, stage, folder, files)
    sys.exit(bool(failed))


def load(options: argparse.Namespace, stage: Stage, folder: Path, files: list[bytes]) -> int:
    """Prints rate and latency of each kind of request, and returns how many failed."""
    failed = 0
    for what, lines in scenarios(stage, folder, files).items():
        result = measure(stage, lines, folder, options.connections, options.seconds)
        failed += result["failed"]
        rate = result["requests"] / result["seconds"]
        print(
            f"{what:24} {rate:8.1f} requests/s  failed {result['failed']}  median {result['p50_ms']:.0f} ms  "
            f"p99 {result['p99_ms']:.0f} ms  max {result['max_ms']:.0f} ms",
            flush=True,
        )
    return failed


def test_bundle(folder: Path, checkout: Path | None) -> Path:
    """The small bundle of the tests of this checkout or of another, whose manifest both can read."""
    if checkout is None:
        return make_bundle(folder)
    call = "import sys; from pathlib import Path; from tests.model_bundles import make_bundle; make_bundle(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    subprocess.run([sys.executable, "-c", call, str(folder)], check=True, cwd=checkout, env=environment)
    return folder


def compare(options: argparse.Namespace, folder: Path, bundle: Path, files: list[bytes]) -> int:
    """Prints the median latencies of both servers and the median of their ratios, and returns how many requests failed."""
    failed = 0
    with (
        server(folder / "ours", bundle, files, options.workers) as ours,
        server(folder / "other", bundle, files, options.workers, options.against) as other,
    ):
        kinds = [scenarios(stage, folder / side, files) for stage, side in ((ours, "ours"), (other, "other"))]
        for what in kinds[0]:
            pairs = []
            for _ in range(options.turns):
                turn = [
                    measure(stage, kind[what], folder, options.connections, options.seconds)
                    for stage, kind in zip((ours, other), kinds, strict=True)
                ]
                failed += sum(result["failed"] for result in turn)
                pairs.append([result["p50_ms"] for result in turn])
            mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(own / others for own, others in pairs)
            print(f"{what:24} median {mine:6.0f} ms, against {theirs:6.0f} ms: {ratio:5.2f}", flush=True)
    return failed


if __name__ == "__main__":
    main()
