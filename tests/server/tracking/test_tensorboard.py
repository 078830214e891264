"""Event files, read back by TensorBoard's own reader: every round once, whatever cuts a file or writes beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pneumofed.common.errors import ConfigError
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import CrossSiteMatrix
from pneumofed.server.tracking.facts import cross_site_numbers
from pneumofed.server.tracking.follow import TrackedGroup, following
from pneumofed.server.tracking.process import send_all
from pneumofed.server.tracking.targets import Tracking, TrackingError, read_target, read_targets
from tests.server.tracking.tracked_runs import begin_run, read_scalars, read_texts, succeed

pytest.importorskip("tensorboard", reason="pip install 'pneumofed[tracking]'")
OWN = Tracking(read_targets(["tensorboard"]))


def test_the_files_hold_what_the_run_folder_holds(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run", seed=7)
    with following(app.folder, OWN):
        for number in (1, 2, 3):
            app.finish_round(number)
        succeed(app, phantom=True)
    found = read_scalars(tmp_path / "run" / "tensorboard")
    assert found["site/north/train_loss"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert np.allclose(found["validation/auroc"], [(1, 0.9), (2, 0.9), (3, 0.9)])
    assert np.allclose(found["final/test/auroc_low"], [(3, 0.8)])
    texts = read_texts(tmp_path / "run" / "tensorboard")
    assert "| seed | 7 |" in texts["settings"][0] and "drawn images" in texts["run"][-1]


def test_the_matrix_of_cross_site_evaluation_is_there_by_model_and_site(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run")
    cells = {name: Metrics.model_validate({"n": 40, "n_positive": 20, "auroc": area}) for name, area in (("a", 0.9), ("b", 0.7))}
    unknown = Metrics.model_validate({"n": 40, "n_positive": 0})
    matrix = CrossSiteMatrix(
        round=1, shared=cells, own={"north": {"north": cells["b"], "so/uth": unknown}, "so/uth": {"north": cells["a"]}}
    )
    app.folder.write_cross_site(matrix)
    with following(app.folder, OWN):
        app.finish_round(1)
        succeed(app)
    found = {
        name: values for name, values in read_scalars(tmp_path / "run" / "tensorboard").items() if name.startswith("cross_site/")
    }
    expected = {"global/a": 0.9, "global/b": 0.7, "north/north": 0.7, "so_uth/north": 0.9}
    assert {name: values[0][1] for name, values in found.items()} == pytest.approx(
        {f"cross_site/{name}": value for name, value in expected.items()}
    )
    many = {str(number): cells["a"] for number in range(40)}
    assert cross_site_numbers(CrossSiteMatrix(round=1, own=dict.fromkeys(many, many))) == {}


def test_the_settings_of_runs_can_be_compared_on_the_page_for_it(tmp_path: Path) -> None:
    """As TensorBoard's own plugin reads them, with their differences named."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for seed in (1, 2):
        app = begin_run(tmp_path / str(seed), seed=seed)
        app.finish_round(1)
        for _ in range(2):
            send_all(app.folder, OWN)
    boards = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    boards.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(boards, str(tmp_path))))
    found = context.experiment_from_metadata(RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), [])
    differing = {info.name for info in found.hparam_infos if info.differs}
    assert differing == {"seed"} and len(found.hparam_infos) > 100


def test_a_resumed_run_doubles_no_step_even_where_the_file_was_cut(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run")
    with following(app.folder, OWN):
        app.finish_round(1)
        app.finish_round(2)
    (file,) = (tmp_path / "run" / "tensorboard").glob("events*")
    whole = read_scalars(file.parent)
    assert whole["round/completed"] == [(1, 1.0), (2, 2.0)]
    events = file.read_bytes()
    at = events.rindex(b"round/completed")
    file.write_bytes(events[: at - 40])  # within the second round's event
    assert read_scalars(file.parent)["round/completed"] == [(1, 1.0)]
    with following(app.folder, Tracking()):
        app.finish_round(3)
        succeed(app)
    send_all(app.folder, Tracking())
    found = read_scalars(file.parent)
    assert found["round/completed"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert found["final/best_round"] == [(3, 3.0)] and all(len(set(points)) == len(points) for points in found.values())


def test_runs_of_one_name_have_folders_of_their_own_and_a_sweeps_lie_under_its_name(tmp_path: Path) -> None:
    place = tmp_path / "board"
    for number in (1, 2):
        app = begin_run(tmp_path / str(number) / "run")
        app.finish_round(1)
        for _ in range(2):
            send_all(app.folder, Tracking(read_targets([f"tensorboard:{place}"])))
    assert sorted(path.name for path in place.iterdir()) == ["run", "run-2"]
    assert all(read_scalars(path)["round/completed"] == [(1, 1.0)] for path in place.iterdir())
    group = TrackedGroup(tmp_path / "sweep", read_targets([f"tensorboard:{place}"]))
    app = begin_run(tmp_path / "sweep" / "a" / "seed-0")
    app.finish_round(1)
    with following(app.folder, group.member("a/seed-0")):
        succeed(app)
    found = read_scalars(place / "sweep" / "a" / "seed-0")
    assert found["validation/n"] == [(1, 40.0)] and not [name for name in found if "test" in name]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    app = begin_run(tmp_path / "run")
    with pytest.raises(TrackingError, match="check the folder"):
        send_all(app.folder, Tracking(read_targets([f"tensorboard:{tmp_path / 'file'}"])))


def test_without_the_extra_the_target_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pneumofed\[tracking\]"):
        read_target("tensorboard")


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path: Path) -> None:
    app = begin_run(tmp_path / "run")
    app.finish_round(1)
    code = (
        "import sys; from pathlib import Path; from pneumofed.server.runs.folder import RunFolder\n"
        "from pneumofed.server.tracking.process import send_all\n"
        "from pneumofed.server.tracking.targets import Tracking, read_targets\n"
        f"send_all(RunFolder(Path({str(app.folder.path)!r})), Tracking(read_targets(['tensorboard'])))\n"
        "print({'torch', 'tensorflow'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
