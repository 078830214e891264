"""The table of all turns: medians over turns, a row a system, a table for each number of hospitals.

A line of `turns.jsonl` is one turn of one system; `python -m benchmarks.peers --table FILE` makes the table of a recorded file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

SYSTEMS = {
    "bare-1": "bare loop, one after the other",
    "bare-n": "bare loop, {parallel} at once",
    "flower": "plain Flower app",
    "nvflare": "NVFlare's simulator",
    "nvflare-all": "NVFlare's simulator, all hospitals at once",
    "pneumofed-local": "pneumofed `--engine local`",
    "pneumofed-flower": "pneumofed `--engine flower`",
}
"""Names for people, by the name on the command line, in the order of a turn."""
NVFLARE_SYSTEMS = ("nvflare", "nvflare-all")
BASE = "bare-n"
COLUMNS = (
    "system", "wall, s", "over the bare loop", "to the first batch, s", "a later round, s", "after the last batch, s", "memory, GB",
    "down, MB", "up, MB", "test AUROC", "weights differ by",
)  # fmt: skip
NOTES = """\
Medians over turns; of wall time the lowest and the highest beside it. One thread a hospital, {parallel} hospitals at once.

- *Over the bare loop*: wall time over that of the bare loop with as many processes.
- *To the first batch*: from the start of the command to the end of the first optimizer step of any process. *A later round*: from the
  first step of a round to that of the next, without the first round where there are three or more. *After the last batch*: from the last
  step to the end of the command; the last evaluation is in it. The same probe in every process writes the steps' times.
- *Memory*: the highest sum of the proportional set sizes of all processes, and of files in /dev/shm that none has mapped, sampled twice a
  second or, where that would take more than a tenth of a core, less often.
- *Down* and *up*: bytes of weights in the messages of one site and round. pneumofed and Flower count what the messages hold; of NVFlare,
  whose transport was not opened, it is the size of the arrays that its client script is given and gives. The bare loop sends nothing.
- *Weights differ by*: the largest difference of a final weight from the first turn's bare loop. The means over hospitals are float32
  sums in another order, or of another number type; BatchNorm over a small last batch enlarges that.
- All evaluate the global model on each hospital's validation images once a round. The script of NVFlare does before it trains, as its
  examples do, so the first model is judged and the last one is not; Flower sends the model once more for it, pneumofed's sites keep it.
- With fewer clients at once than there are, NVFlare's simulator starts a process for each change of client, and one more at the end for
  each; all at once it needs as many processes as hospitals, and shares the cores among them.
- Each judges its last model on the test set at the end. pneumofed also judges the best round's model, and writes history, checkpoints,
  hashes and report; its images lie in PNG files, which it reads, checks and caches; the others map the decoded file.
- Flower's start-up is that of `flwr run`, its SuperLink and Ray, for the plain app and for pneumofed's engine on it alike.
  Ray runs its workers at niceness 15, so that anything else on the machine slows these two down first."""


@dataclass(frozen=True)
class Turn:
    """One run of one system.

    Attributes:
        system: a key of `SYSTEMS`.
        hospitals, turn: which run it was.
        parallel: hospitals at once.
        wall: seconds of the command.
        first: seconds to the end of the first optimizer step.
        later: seconds of a later round.
        end: seconds after the last optimizer step.
        peak_bytes: of memory, all processes.
        down, up: bytes a site and round; None where nothing is sent.
        auroc: on the test set.
        difference: largest difference of a final weight from the bare loop's; None where there was none to compare with.
    """

    system: str
    hospitals: int
    turn: int
    parallel: int
    wall: float
    first: float
    later: float
    end: float
    peak_bytes: float
    down: float | None
    up: float | None
    auroc: float
    difference: float | None

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_turns(file: Path) -> list[Turn]:
    return [Turn(**json.loads(line)) for line in file.read_text().splitlines()]


def later_round(steps: Sequence[float], steps_a_round: int) -> float:
    """Computes the median seconds from a round's first step to the next round's, without the first round where others are left.

    Rounds wait for all their hospitals, so that the steps in the order of time are those of the rounds one after the other.

    Args:
        steps: times of all optimizer steps, ascending.
        steps_a_round: of all hospitals.

    Raises:
        ValueError: not a whole number of rounds, or fewer than two.
    """
    rounds, left = divmod(len(steps), steps_a_round)
    if left or rounds < 2:
        raise ValueError(f"{len(steps)} optimizer steps are no two or more rounds of {steps_a_round}")
    starts = steps[::steps_a_round]
    seconds = [after - before for before, after in pairwise(starts)]
    return statistics.median(seconds[1:] or seconds)


def build_tables(turns: Sequence[Turn]) -> str:
    """Makes the Markdown tables with their notes.

    Args:
        turns: of all systems, in any order; at least one.
    """
    parts = []
    for hospitals in sorted({turn.hospitals for turn in turns}):
        own = [turn for turn in turns if turn.hospitals == hospitals]
        rows = [_row(name, [turn for turn in own if turn.system == name], own) for name in SYSTEMS]
        lines = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ("---",) * len(COLUMNS), *filter(None, rows))]
        parts.append(f"**{hospitals} hospitals, {len({turn.turn for turn in own})} turns**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, NOTES.format(parallel=turns[0].parallel)])


def _row(name: str, own: Sequence[Turn], turns: Sequence[Turn]) -> tuple[str, ...] | None:
    if not own:
        return None

    def median(value: Callable[[Turn], float | None], among: Sequence[Turn] = own) -> float | None:
        values = [found for turn in among if (found := value(turn)) is not None]
        return statistics.median(values) if values else None

    wall, base = median(lambda turn: turn.wall), median(lambda turn: turn.wall, [one for one in turns if one.system == BASE])
    walls = [turn.wall for turn in own]
    spread = f" ({min(walls):.1f} to {max(walls):.1f})" if len(walls) > 1 else ""
    return (
        SYSTEMS[name].format(parallel=own[0].parallel),
        f"{wall:.1f}{spread}",
        _shown(wall / base if wall is not None and base else None, "{:.2f}"),
        _shown(median(lambda turn: turn.first), "{:.1f}"),
        _shown(median(lambda turn: turn.later), "{:.1f}"),
        _shown(median(lambda turn: turn.end), "{:.1f}"),
        _shown(median(lambda turn: turn.peak_bytes), "{:.2f}", 1e9),
        _shown(median(lambda turn: turn.down), "{:.1f}", 1e6),
        _shown(median(lambda turn: turn.up), "{:.1f}", 1e6),
        _shown(median(lambda turn: turn.auroc), "{:.4f}"),
        _shown(median(lambda turn: turn.difference), "{:.0e}"),
    )


def _shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "none" if value is None else form.format(value / unit)
