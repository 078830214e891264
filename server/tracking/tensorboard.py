"""A run as TensorBoard's event files, written with the package `tensorboard`; neither torch nor TensorFlow is loaded.

Every round is one event, so that a file that was cut holds whole rounds only. The files themselves say which rounds they have: a resumed
run, or a second process, doubles no step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pneumofed.common.files import write_file
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.tracking.facts import MARKER, TrackedFacts
from pneumofed.server.tracking.targets import TrackedRun, TrackingError, TrackingTarget

OWN_FOLDER = "tensorboard"
"""In the run folder, where the target names no other."""
MARK_FILE = "pneumofed-run"
"""Beside the event files: whose they are."""
EVENT_FILES = "events.out.tfevents.*"
HPARAMS_TAG = "_hparams_/session_start_info"
"""Of tensorboard/plugins/hparams/metadata.py."""


class TensorboardRun:
    """One run in one folder of event files: `DIR/NAME` (of a sweep `DIR/SWEEP/NAME`), or `tensorboard` in the run folder.

    Args:
        target: its folder.
        tracked: the run's mark and name.
        folder: of the run.
    """

    def __init__(self, target: TrackingTarget, tracked: TrackedRun, folder: RunFolder) -> None:
        below = f"{tracked.group[1]}/{tracked.name}" if tracked.group else tracked.name
        self._place = Path(target.place) / below if target.place else folder.path / OWN_FOLDER
        self._tracked = tracked
        self._file: Any = None
        self._writer: Any = None
        self._rounds = 0
        self._known: dict[str, Any] = {}

    def send(self, facts: TrackedFacts, over: bool) -> None:
        """Writes what the folder does not have.

        Args:
            facts: of the run now.
            over: whether the run has ended, so that its results are written too.

        Raises:
            TrackingError: the folder cannot be written or read.
        """
        try:
            if self._writer is None:
                self._open()
            texts = {"settings": _table(facts.params), "run": _table(facts.tags, facts.note)}
            new_texts = {name: text for name, text in texts.items() if self._known.get(name) != text}
            for name, text in new_texts.items():
                self._write({name: text}, facts.last_round, facts.started_ms)
            if facts.params and HPARAMS_TAG not in self._known:
                self._write_settings(facts)
            for line in facts.rounds:
                if line.round > self._rounds:
                    self._write(line.numbers, line.round, line.time_ms)
                    self._rounds = line.round
            if over:
                final = {name: value for name, value in facts.final.items() if self._known.get(name) != _float32(value)}
                if final:
                    self._write(final, facts.last_round, facts.ended_ms)
            self._file.flush()
        except OSError as error:
            raise TrackingError(
                f"cannot be written ({error.strerror or type(error).__name__}): check the folder and the disk"
            ) from None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._place = self._own_folder()
        for numbers, step in _read_events(self._place):
            self._known |= numbers
            self._rounds = max(self._rounds, step if MARKER in numbers else 0)
        # Named as TensorBoard finds them, in their order; without this machine's name.
        name = f"{EVENT_FILES.removesuffix('*')}{time.time_ns() // 10**9}.pneumofed.{time.time_ns() % 10**9:09d}"
        self._file = (self._place / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write_event(wall_time=time.time(), file_version="brain.Event:2")

    def _own_folder(self) -> Path:
        """The folder of this run: where another run's files lie, `NAME-2`, `NAME-3`, ... is taken."""
        number, place = 1, self._place
        while not self._is_ours(place):
            number += 1
            place = self._place.with_name(f"{self._place.name}-{number}")
        place.mkdir(parents=True, exist_ok=True)
        if not (place / MARK_FILE).exists():
            write_file(place / MARK_FILE, f"{self._tracked.run}\n".encode())
        return place

    def _is_ours(self, place: Path) -> bool:
        mark = place / MARK_FILE
        if mark.exists():
            return mark.read_text(encoding="ascii", errors="replace").strip() == self._tracked.run
        return next(place.glob(EVENT_FILES), None) is None

    def _write(self, values: Mapping[str, float | str], step: int, time_ms: int) -> None:
        """One event with all the values, as scalars or as text."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = [_text(name, value) if isinstance(value, str) else _scalar(name, value) for name, value in values.items()]
        self._write_event(wall_time=time_ms / 1000, step=step, summary=Summary(value=shown))
        self._known |= {name: value if isinstance(value, str) else _float32(value) for name, value in values.items()}

    def _write_settings(self, facts: TrackedFacts) -> None:
        """The settings as TensorBoard's page HPARAMS compares them (tensorboard/plugins/hparams/plugin_data.proto)."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        start = SessionStartInfo(start_time_secs=facts.started_ms / 1000)
        for key, text in facts.params.items():
            number = _number(text)
            if number is None:
                start.hparams[key].string_value = text
            else:
                start.hparams[key].number_value = number
        content = HParamsPluginData(session_start_info=start, version=0).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        value = Summary.Value(tag=HPARAMS_TAG, metadata=SummaryMetadata(plugin_data=plugin))
        self._write_event(wall_time=facts.started_ms / 1000, step=0, summary=Summary(value=[value]))
        self._known[HPARAMS_TAG] = 0.0

    def _write_event(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(**fields).SerializeToString())


def _read_events(place: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The values and the step of each event in the folder, in the order of the files; a file that was cut ends before its cut."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for path in sorted(place.glob(EVENT_FILES)):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            found: dict[str, Any] = {}
            for value in event.summary.value:
                is_text = value.WhichOneof("value") == "tensor" and len(value.tensor.string_val) == 1
                found[value.tag] = value.tensor.string_val[0].decode() if is_text else value.simple_value
            yield found, int(event.step)


def _scalar(name: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=name, simple_value=value)


def _text(name: str, text: str) -> Any:
    """A value that TensorBoard's text page shows, as Markdown (tensorboard/plugins/text/metadata.py)."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(tag=name, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _float32(value: float) -> float:
    """As an event holds it."""
    import struct

    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _table(values: Mapping[str, str], note: str = "") -> str:
    """A table in Markdown."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in values.items())
    return f"{note}\n\n| | |\n|---|---|\n{rows}".lstrip()
