"""Makes the fixtures in this folder: what version 0.2.0 left on disk, and the digests of weights that it reached.

    git clone . ../former && git -C ../former checkout dc51b9f && make -C ../former install
    python tests/former/make.py --pneumofed ../former/.venv/bin/pneumofed --out tests/former/0.2.0

Everything is made through the command line, and nothing of the project is imported, so that this file runs beside any version and shows
how each fixture came to be. All images are phantoms. Needs nginx, for the coordinator's door; takes about three minutes.

    images          `pneumofed phantom`, 24 patients at 64 px: what all others were made of
    finished        three hospitals, three rounds of a small network, over all
    broken          the same, interrupted after its first round
    broken-adam     FedAdam with a moving average, interrupted after its first round: the strategy's own state
    bundle          `pneumofed export` of `finished`
    coordinator     a federation of processes over TLS with two runs, one plain and one private
    north           one of its two hospitals: images de-identified or in place, policy, ledger, audit log, a withdrawal
    room, monitor   a reading room with two users, two cases and a finding, and the monitor of drift beside it
    answers.json    what the version's commands said of all these
    digests.json    of the weights of small runs, and which machine's last bits they have

The work folder's path is replaced by `@FORMER@` in text files and in the registry, and machine names are taken out; `tests.former.opened`
puts a test's own folder in its place. Caches, logs, reports, figures and the state of Flower's own processes are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

PLACE = "@FORMER@"
ARCHIVES = {
    "runs": ("images", "finished", "broken", "broken-adam", "bundle"),
    "federation": ("coordinator", "north", "dicom"),
    "room": ("room", "monitor"),
}
LEFT_OUT = re.compile(
    r"/bundle/model\.zip$|/cache(/|$)|/figures/|/report\.html$|\.log$|/lock$|\.lock$|\.pid$|/heartbeat$|\.sock$|/state/(?!registry\.db$|audit\.jsonl$|room\.db$)"
    r"|/work/(apps|gate|flower)(/|$)|/quarantine/|-(wal|shm)$|/dicom/dicom/test/|/dicom/dicom/external/|/nginx\.conf$"
)
PASSWORDS = {"li": "a long pass phrase", "wang": "another long pass phrase"}

SMALL = ("--hospitals", "3", "--partition", "iid", "--rounds", "3", "--image-size", "32", "--engine", "local")
TINY = {"model.name": "small_cnn", "training.precision": "fp32", "training.batch_size": 8, "evaluation.bootstrap_samples": 20}
ADAM = {**TINY, "model.name": "scattering", "model.norm": "group", "strategy.name": "fedadam", "strategy.ema_decay": 0.5}
PRIVATE = {
    "model.name": "scattering",
    "model.norm": "group",
    "loss.logit_adjustment": "false",
    "loss.label_smoothing": 0.0,
    "training.optimizer": "sgd",
    "strategy.max_update_norm_factor": 1000.0,
    "privacy.mechanism": "dp_sgd",
    "privacy.noise_multiplier": 2.0,
    "privacy.expected_batch_size": 8,
    "privacy.physical_batch_size": 8,
}
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"strategy.name": "fedprox", "training.proximal_mu": 0.1},
    "fedbn": {"strategy.name": "fedbn"},
    "fedexp": {"strategy.name": "fedexp"},
    "fedadam_ema": {"strategy.name": "fedadam", "strategy.ema_decay": 0.5},
    "float16_updates": {"strategy.update_precision": "float16"},
    "sgd_focal_group_norm": {"training.optimizer": "sgd", "loss.name": "focal", "model.norm": "group"},
    "dp_sgd": PRIVATE,
    "dp_sgd_convolutions": {**PRIVATE, "model.name": "small_cnn", "privacy.unit": "image"},
    "central_privacy": {"model.norm": "group", "central_privacy.enabled": "true", "central_privacy.noise_multiplier": 0.5},
    "secure_aggregation": {"secure_aggregation.enabled": "true"},
}
"""Small runs whose weights are compared: settings beside `TINY`."""
NOISY = ("dp_sgd", "dp_sgd_convolutions", "central_privacy")
"""Their noise depends on the run's random name, which is fixed for them."""


def case_arguments(name: str, data: Path, out: Path) -> list[str]:
    """The arguments of `pneumofed` for the run `name` of `CASES` over the images in `data`, into `out`."""
    hospitals = "3" if name == "secure_aggregation" else "2"  # fewer are refused
    shape = ("--hospitals", hospitals, "--partition", "iid", "--rounds", "2", "--image-size", "32", "--engine", "local")
    return ["simulate", "--data", str(data), *shape, *settings({**TINY, **CASES[name]}), "--out", str(out)]


def settings(values: dict[str, Any]) -> list[str]:
    """`--set` for each of the values."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def weights_of(checkpoint: Path) -> dict[str, Any]:
    """All tensors in a checkpoint by name: the model, the strategy's state, and what a moving average trains on."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    parts = [(part, content.get(part, {})) for part in ("model", "strategy", "training")]
    return {f"{part}.{name}": tensor for part, tensors in parts for name, tensor in sorted(tensors.items())}


def digest_of(checkpoint: Path) -> str:
    """SHA-256 over name, type, shape and bytes of all tensors in a checkpoint."""
    found = hashlib.sha256()
    for name, tensor in weights_of(checkpoint).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def length_of(checkpoint: Path) -> float:
    """L2 norm of the model's floating point tensors: nearly the same on every machine."""
    import torch

    model = {name: tensor for name, tensor in weights_of(checkpoint).items() if name.startswith("model.")}
    return float(sum(tensor.double().square().sum() for tensor in model.values() if torch.is_floating_point(tensor)) ** 0.5)


def machine() -> dict[str, str]:
    """What decides the last bits of a training: torch, what of the processor torch uses, and the digest of a training without our code.

    The last tells apart processors whose libraries sum in another order though torch calls their instructions by one name.
    """
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(16, 64, 3, padding=1, bias=False), torch.nn.GroupNorm(32, 64), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(64, 128, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128 * 64, 2)),
    )
    images, labels = torch.randn(8, 1, 32, 32), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    probe = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in network.state_dict().values()))
    return {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "probe": probe.hexdigest(),
    }


KNOWN = ("--bundle", "bundle/model", "--trusted", "bundle/signing.pub")
ANSWERS: dict[str, tuple[str, ...]] = {
    "config": ("config", "finished/config.yaml"),
    "predict": ("predict", "images/test", *KNOWN, "--threads", "1", "--json"),
    "monitor": ("monitor", "check", *KNOWN, "-C", "monitor", "--json"),
    "monitor of the room": ("monitor", "check", *KNOWN, "-C", "room/monitor", "--json"),
    "site data": ("site", "data", "check", "--size", "32", "-C", "north", "--json"),
    "approved": ("site", "approve", "--list", "-C", "north"),
    "privacy show": ("privacy", "show", "-C", "north", "--json"),
    "privacy verify": ("privacy", "verify", "-C", "north", "--json"),
    "privacy plan": ("privacy", "plan", "coordinator/runs/private/config.yaml", "-C", "north", "--json"),
    "audit of the site": (
        *("audit", "verify", "north/work/audit.jsonl", "--anchored-by", "coordinator/state/audit.jsonl", "--json"),
    ),
    "audit of the coordinator": ("audit", "verify", "coordinator/state/audit.jsonl", "--json"),
    "audit of the room": ("audit", "verify", "room/state/audit.jsonl", "--json"),
    "entries of the site": ("audit", "show", "north/work/audit.jsonl", "--json"),
    "server status": ("server", "status", "-C", "coordinator", "--json"),
    "users": ("reading-room", "user", "list", "-C", "room", "--json"),
    "tokens": ("reading-room", "token", "list", "-C", "room", "--json"),
}
"""Commands that read the fixtures, called in their folder; `answers.json` keeps what version 0.2.0 said to each."""

SAME_RUN = """
import secrets
secrets.token_hex = lambda number=8: "0" * (2 * number)
"""
"""A run's random name, which private noise depends on, is fixed."""
NO_TRACES = """
import torch
real = torch.onnx.export
def export(*arguments, **options):
    program = real(*arguments, **options)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    return program
torch.onnx.export = export
"""
"""The exporter's traces, which name folders of the machine, are left out of the graph; it computes the same."""


class Maker:
    """Calls the command line of one version in `root`, where everything is made."""

    def __init__(self, pneumofed: Path, root: Path) -> None:
        self.pneumofed, self.root = str(pneumofed.absolute()), root
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOGNAME": "engineer"}

    def call(self, *arguments: str | Path, text: str | None = None, ok: Sequence[int] = (0,), patch: str = "") -> str:
        """What `pneumofed ARGUMENTS` printed, in a Python that ran `patch` first."""
        command = [self.pneumofed, *map(str, arguments)]
        if patch:
            script = f"{patch}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
            command = [str(Path(self.pneumofed).with_name("python")), "-c", script, *command]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, cwd=self.root, env=self.environment, timeout=400
        )
        if done.returncode not in ok:
            raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def runs(self) -> dict[str, str]:
        """`images`, `finished`, the two broken runs and `bundle`; returns the digests of the broken runs, unbroken."""
        data = self.root / "images"
        self.call("phantom", data, "--patients", "24", "--seed", "0", "--size", "64")
        told = ("simulate", "--data", data, "--external", data / "external", *SMALL)
        self.call(*told, *settings(TINY), "--out", "finished")
        digests = {}
        for name, values in (("broken", TINY), ("broken-adam", ADAM)):
            self.call(*told, *settings(values), "--out", f"whole-{name}")
            digests[name] = digest_of(self.root / f"whole-{name}" / "checkpoints" / "last.pt")
            self.break_off(name, [*map(str, told), *settings(values), "--out", name])
        self.call("phantom", "reference", "--patients", "80", "--seed", "2", "--size", "64")  # a monitor needs sixty patients
        key = self.signing_key()
        model = ("--out", "bundle/model", "--key", key, "--reference", "reference/train")
        self.call("export", "finished", *model, patch=NO_TRACES)
        return digests

    def break_off(self, name: str, arguments: list[str]) -> None:
        """Interrupts the run as soon as its first round is in its history."""
        while True:
            shutil.rmtree(self.root / name, ignore_errors=True)
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(
                [self.pneumofed, *arguments], cwd=self.root, env=self.environment, stdout=quiet, stderr=quiet,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            checkpoint = self.root / name / "checkpoints" / "last.pt"
            while process.poll() is None and not checkpoint.exists():
                time.sleep(0.001)
            process.send_signal(signal.SIGINT)
            process.wait()
            summary = json.loads((self.root / name / "summary.json").read_text())
            if summary["status"] == "stopped" and summary["rounds_completed"] < 3:
                return

    def signing_key(self) -> Path:
        """A throw-away key that signs the bundle, and its public half beside it."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key, file = ec.generate_private_key(ec.SECP384R1()), self.root / "bundle" / "signing"
        file.parent.mkdir()
        openssh = serialization.PrivateFormat.OpenSSH
        file.touch(0o600)
        file.write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        file.with_suffix(".pub").write_bytes(public + b" test\n")
        return file

    def federation(self) -> None:
        """`coordinator` and `north`, after a plain run, a private run and one that the hospitals' policy refused."""
        self.call("phantom", "dicom", "--patients", "24", "--seed", "1", "--size", "64", "--format", "dicom")
        names = self.provision()
        try:
            self.call("server", "start", "-C", "coordinator")
            for name in names:
                self.call("site", "start", "-C", name)
            wait = {**TINY, "strategy.wait_for_sites": 2, "image.size_px": 32, "rounds": 2}
            self.run("plain", {**wait, **{key: value for key, value in ADAM.items() if not key.startswith("strategy")}})
            self.set_policy(
                "north", max_epsilon=20.0, max_delta=1e-3, min_unit="patient", count_noise=2.0, withhold=["data_report"]
            )
            self.run("private", {**wait, **PRIVATE, "privacy.delta": 1e-3})
            self.run("refused", {**wait, "rounds": 1, "strategy.min_sites": 2}, ok=(1,))
        finally:
            for name in names:
                self.call("site", "stop", "-C", name, ok=range(256))
            self.call("server", "stop", "-C", "coordinator", ok=range(256))
        self.call("site", "approve", "ab" * 32, "-C", "north")
        patients = (self.root / "north" / "data" / "manifest.csv").read_text().splitlines()
        self.call("site", "data", "remove", "--patients", "-", "-C", "north", text=patients[1].split(",")[1] + "\n")

    def provision(self) -> tuple[str, ...]:
        """Kits for a coordinator and two hospitals, unpacked, with data; returns the hospitals."""
        ports = free_ports(5)
        loopback = dict(zip(("superlink", "superlink_health", "superexec_health", "page"), ports[1:], strict=True))
        names = ("north", "south")
        coordinator = {"hosts": ["127.0.0.1"], "port": ports[0], "loopback": loopback}
        content = {"name": "former", "coordinator": coordinator, "sites": [{"name": name} for name in names]}
        (self.root / "federation.yaml").write_text(json.dumps(content))  # JSON is YAML
        self.call("provision", "federation.yaml", "--out", "kits", "--with-keys")
        shutil.copytree(self.root / "kits" / "coordinator", self.root / "coordinator")
        test = self.root / "finished" / "coordinator" / "test.csv"
        shutil.copy(test, self.root / "coordinator" / "test.csv")
        local = {"test_manifest": "test.csv", "device": "cpu", "threads": 1}
        (self.root / "coordinator" / "local.yaml").write_text(json.dumps(local))
        for name in names:
            self.call("site", "init", name, "--kit", f"kits/{name}.tar.gz")
            with (self.root / name / "site.yaml").open("a") as file:
                file.write("device: cpu\nthreads: 1\n")
            self.set_policy(name, min_patients=2)
        self.call("site", "data", "add", "dicom", "dicom/dicom/train", "--labels", "dicom/labels.csv", "-C", "north")
        self.call("site", "data", "add", "kaggle", "images", "-C", "south")
        return names

    def set_policy(self, site: str, **values: Any) -> None:
        """Adds keys to a hospital's policy, in the place of those that are there."""
        file = self.root / site / "policy.yaml"
        kept = [line for line in file.read_text().splitlines() if line.split(":")[0] not in values]
        file.write_text("\n".join([*kept, *(f"{key}: {json.dumps(value)}" for key, value in values.items())]) + "\n")

    def run(self, name: str, values: dict[str, Any], ok: Sequence[int] = (0,)) -> None:
        """A run of the federation, to its end."""
        self.call("server", "run", name, *settings({"name": name, **values}), "--wait", "-C", "coordinator", ok=ok)

    def room(self) -> None:
        """`room`, filled through its server, and `monitor`, filled from the command line."""
        import httpx

        bundle = self.root / "bundle" / "model"
        known = ("--trusted", "bundle/signing.pub")
        images = sorted((self.root / "images" / "test").rglob("*.jpeg"))
        self.call("monitor", "add", *images[:8], "--bundle", bundle, "-C", "monitor", "--day", "2026-11-20", *known)
        self.call("reading-room", "init", "room", "--bundle", bundle, "--hospital", "North", *known)
        (port,) = free_ports(1)
        with (self.root / "room" / "room.yaml").open("a") as file:  # retention, so that the cases outlive the next ninety days
            file.write(f"port: {port}\nworkers: 1\nretention_days: 36500\n")
        for name, role in (("li", "admin"), ("wang", "radiologist")):
            self.call("reading-room", "user", "add", name, "--role", role, "--password-stdin", "-C", "room", text=PASSWORDS[name])
        self.call("reading-room", "token", "add", "ris", "-C", "room")
        server = subprocess.Popen([self.pneumofed, "reading-room", "start", "-C", "room"], cwd=self.root, env=self.environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as client:
                self.read_cases(client, [images[0], next((self.root / "dicom" / "dicom" / "train").glob("*.dcm"))])
        finally:
            server.terminate()
            server.wait()

    def read_cases(self, client: Any, files: Sequence[Path]) -> None:
        """Uploads the files as a reader and says of the first that it is normal."""
        import httpx

        wait_until_ready(client.get, httpx.ConnectError)
        me = client.post("/api/login", json={"user": "wang", "password": PASSWORDS["wang"]}).raise_for_status().json()
        client.headers["x-csrf-token"] = me["csrf"]
        parts = [("files", (file.name, file.read_bytes())) for file in files]
        told = client.post("/api/cases", files=parts).raise_for_status().json()["files"]
        case = told[0]["case"]
        client.get(f"/api/cases/{case}").raise_for_status()
        client.post(f"/api/cases/{case}/findings", json={"label": "normal", "note": "clear"}).raise_for_status()
        client.post("/api/logout").raise_for_status()

    def digests(self) -> dict[str, dict[str, Any]]:
        """Digest and length of the weights of each of `CASES`."""
        found = {}
        for name in CASES:
            out = self.root / "digests" / name
            self.call(*case_arguments(name, self.root / "images", out), patch=SAME_RUN if name in NOISY else "")
            checkpoint = out / "checkpoints" / "last.pt"
            found[name] = {"weights": digest_of(checkpoint), "length": length_of(checkpoint)}
        return found

    def answers(self) -> dict[str, Any]:
        """What the version said to each of `ANSWERS`."""
        return {name: plain(self.call(*told, ok=range(256)), self.root) for name, told in ANSWERS.items()}

    def scrub(self) -> None:
        """Takes this machine out of what goes into the archives."""
        for name in (name for names in ARCHIVES.values() for name in names):
            for database in [*(self.root / name).rglob("*.db"), *(self.root / name).rglob("*.sqlite")]:
                self.close_database(database)
            for path in (path for path in (self.root / name).rglob("*") if path.is_file() and not LEFT_OUT.search(str(path))):
                if path.name == "environment.json":
                    content = {**json.loads(path.read_text()), "platform": "Linux", "cpu": "a processor"}
                    path.write_text(json.dumps(content, indent=2) + "\n")
                if path.suffix in (".yaml", ".csv", ".json"):
                    path.write_text(path.read_text().replace(str(self.root), PLACE))

    def close_database(self, path: Path) -> None:
        """Brings the write-ahead log into the database, and the place-holder into the registry."""
        connection = sqlite3.connect(path)
        if path.name == "registry.db":
            connection.execute("UPDATE run SET folder = replace(folder, ?, ?)", (str(self.root), PLACE))
            connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
        connection.close()

    def names(self) -> list[str]:
        """Names of this machine and of folders on it, which stand in no fixture."""
        folders = [
            str(self.root),
            str(Path(self.pneumofed).parents[2]),
            str(Path(sys.prefix).resolve().parent),
            f"{Path.home()}/",
        ]
        return [
            name for name in (*folders, socket.gethostname(), platform.release()) if len(name) > 3
        ]  # shorter ones are in anything

    def pack(self, out: Path) -> None:
        """Writes the archives: sorted, without owners and times."""
        for archive, names in ARCHIVES.items():
            with (
                lzma.open(out / f"{archive}.tar.xz", "wb", preset=9) as file,
                tarfile.open(fileobj=file, mode="w", dereference=True) as tar,
            ):
                for path in sorted(path for name in names for path in (self.root / name).rglob("*")):
                    if LEFT_OUT.search(str(path)):
                        continue
                    info = tar.gettarinfo(path, str(path.relative_to(self.root)))
                    info.uid, info.gid, info.mtime = 0, 0, 946684800  # a ZIP file knows no time before 1980
                    info.uname = info.gname = ""
                    if info.isfile():
                        check_clean(path, self.names())
                        with path.open("rb") as content:
                            tar.addfile(info, content)
                    elif info.isdir():
                        tar.addfile(info)


def wait_until_ready(get: Callable[[str], Any], *refused: type[Exception], seconds: float = 120.0) -> None:
    """Waits until a room can judge, asked through the client's `get`: what is uploaded while its workers start may fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(*refused):
            if get("/api/health").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the room is not ready")


def plain(printed: str, root: Path) -> Any:
    """What a command printed, as JSON where it is, with `PLACE` for the folder `root`."""
    text = re.sub(r"installed  [0-9a-f]{64}", "installed", printed.replace(str(root), PLACE))  # of the code that runs
    try:
        return json.loads(text)
    except ValueError:
        return text.splitlines()


def check_clean(path: Path, names: Sequence[str]) -> None:
    """Ends where a file holds one of the names."""
    content = path.read_bytes()
    for name in names:
        if name.encode() in content:
            raise SystemExit(f"{path} holds {name}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return found


def main() -> None:
    """Makes everything in a new folder and packs it into `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pneumofed", type=Path, required=True, help="the command of the version, in its own environment")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    maker = Maker(given.pneumofed, Path(mkdtemp(prefix="former-")).resolve())
    sys.stderr.write(f"made in {maker.root}\n")
    resumed = maker.runs()
    digests = maker.digests()
    shutil.rmtree(maker.root / "digests")
    again = maker.digests()
    if digests != again:
        raise SystemExit(f"not repeatable on this machine: {[name for name in digests if digests[name] != again[name]]}")
    maker.federation()
    maker.room()
    answers = maker.answers()
    maker.scrub()
    given.out.mkdir(parents=True, exist_ok=True)
    maker.pack(given.out)
    content = {"machine": machine(), "resumed": resumed, "runs": digests}
    (given.out / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    check_clean(given.out / "answers.json", maker.names())
    (given.out / "digests.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
