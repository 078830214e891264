"""The attack bench from end to end (`run_attacks`), and its report: `attack.json` with the numbers, `attack.html` with the pictures too.

Reconstructed pictures are shown of phantoms, or of images in the folder that the person who runs the bench gave it. The bench reads
nothing else.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pneumofed.common.evaluation import plots
from pneumofed.common.evaluation.metrics import without_nan
from pneumofed.common.evaluation.plots import FAINT, INK, LINE_STYLES, TEXT_PT, colour_of, new_figure
from pneumofed.common.files import atomic_write
from pneumofed.common.ops.render import render
from pneumofed.server.report.numbers import DASH, ReportedEstimate, number
from pneumofed.server.runs.summary_records import MetricInterval
from pneumofed.simulation.attacks.bench import Bench, Membership, Say, attack_canaries, attack_membership
from pneumofed.simulation.attacks.inversion import Images
from pneumofed.simulation.attacks.inversion_bench import MASKED_VIEW, MEAN_VIEW, PLAIN_VIEW, Inversion, attack_gradients
from pneumofed.simulation.attacks.membership import FALSE_POSITIVE_RATES, Share
from pneumofed.simulation.attacks.settings import AttackName

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTACK_TITLES = {"loss": "Loss threshold", "lira": "LiRA"}
TILE_PX = 96
NO_INVERSION: tuple[Images | None, list[Inversion]] = (None, [])


@dataclass(frozen=True)
class AttackFindings:
    """What the attacks found; empty where an attack was not asked for."""

    membership: list[Membership] = field(default_factory=list)
    canaries: list[dict[str, Any]] = field(default_factory=list)
    images: Images | None = None
    inversions: list[Inversion] = field(default_factory=list)


def run_attacks(bench: Bench, attacks: Sequence[AttackName], out: Path, say: Say) -> Path:
    """Runs the attacks and writes their report.

    Pure in `bench` on one machine, but for a private experiment with `secure_noise`.

    Args:
        bench: what is attacked.
        attacks: which of the three to run; the others are left out of the report.
        out: folder of `attack.json` and `attack.html`, made if need be.
        say: takes sentences about the progress.

    Returns:
        The path of the report, `out/attack.html`.

    Raises:
        ConfigError: the model cannot be trained privately.
        OSError: `out` cannot be written.
    """
    membership = attack_membership(bench, say) if "membership" in attacks else []
    canaries = attack_canaries(bench, say) if "canaries" in attacks else []
    images, inversions = attack_gradients(bench, say) if "inversion" in attacks else NO_INVERSION
    return write_findings(bench, AttackFindings(membership, canaries, images, inversions), out)


def write_findings(bench: Bench, found: AttackFindings, out: Path) -> Path:
    """Writes `attack.json` and `attack.html`.

    Args:
        bench: what was attacked.
        found: what the attacks found.
        out: folder, made if need be; older files of these names are replaced.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "attack.json", json.dumps(as_json(bench, found), indent=1, allow_nan=False))
    _write(out / "attack.html", render_page(bench, found))
    return out / "attack.html"


def as_json(bench: Bench, found: AttackFindings) -> dict[str, Any]:
    """Collects all numbers for JSON, without any image; an infinite epsilon is the text `inf`, what is undefined null.

    Args:
        bench: its settings and experiment are kept beside the numbers.
        found: what the attacks found.
    """
    values = {
        "settings": bench.cfg.model_dump(),
        "experiment": bench.experiment.model_dump(),
        "phantom": bench.phantom,
        "membership": [_membership_values(row) for row in found.membership],
        "canaries": found.canaries,
        "inversion": [{key: value for key, value in vars(row).items() if key != "reconstructions"} for row in found.inversions],
    }
    return dict(_readable(values))


def render_page(bench: Bench, found: AttackFindings) -> str:
    """Renders the report as one HTML page, which needs no other file.

    Args:
        bench: what was attacked; the page says so where the images are phantoms.
        found: an attack that is empty gets no section.
    """
    patients = len(set(bench.site.patients))
    return render(
        __package__,
        "attack.html",
        bench=bench,
        patients=patients,
        membership_rows=[row for result in found.membership for row in _membership_rows(result)],
        rates=[f"{rate:.1%}" for rate in FALSE_POSITIVE_RATES],
        others=bench.cfg.models * (patients - patients // 2),
        roc=_uri(plots.render_figure(draw_roc(found.membership))) if found.membership else "",
        canary_rows=[_canary_row(row) for row in found.canaries],
        originals=[_tile(image) for image in found.images] if found.images is not None else [],
        inversion_rows=[_inversion_row(row) for row in found.inversions],
        candidates=found.inversions[0].candidates if found.inversions else 0,
    )


def draw_roc(results: Sequence[Membership]) -> Figure:
    """Draws ROC curves of both attacks at each epsilon on logarithmic axes, where few false alarms can be seen; grey: guessing."""
    figure, (ax,) = new_figure()
    least = min(1.0 / max(1, row.attacks["lira"].true_positive_rates[0]["n"]) for row in results) / 2.0
    ax.plot([least, 1], [least, 1], color=FAINT, linewidth=1)
    for index, row in enumerate(results):
        for line, (name, verdict) in zip(LINE_STYLES, row.attacks.items(), strict=False):
            false, true = verdict.roc.clip(least, 1.0)
            label = f"{ATTACK_TITLES[name]}, {_epsilon(row.epsilon)}"
            ax.plot(false, true, color=colour_of(index), linestyle=line, linewidth=1.5, label=label)
    ax.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
    ax.set(xlabel="Others taken for members (false positive rate)", ylabel="Members found (true positive rate)")
    ax.legend(loc="lower right", fontsize=TEXT_PT - 1, frameon=True, framealpha=0.9, edgecolor="none", labelcolor=INK)
    return figure


def _membership_values(row: Membership) -> dict[str, Any]:
    attacks = {
        name: {
            "auroc": verdict.auroc,
            "true_positive_rates": dict(zip(map(str, FALSE_POSITIVE_RATES), verdict.true_positive_rates, strict=True)),
        }
        for name, verdict in row.attacks.items()
    }
    return {"epsilon": row.epsilon, "plan": _plan_values(row), "accuracy": row.accuracy, "attacks": attacks}


def _plan_values(row: Membership) -> dict[str, Any] | None:
    if row.plan is None:
        return None
    keys = ("unit", "sampling_rate", "steps_per_round", "rounds", "delta", "noise_multiplier")
    return {key: getattr(row.plan, key) for key in keys}


def _membership_rows(row: Membership) -> list[dict[str, Any]]:
    return [
        {
            "epsilon": _epsilon(row.epsilon),
            "noise": f"noise {number(row.plan.noise_multiplier, 2)}" if row.plan else "",
            "attack": ATTACK_TITLES[name],
            "auroc": ReportedEstimate.of(MetricInterval.model_validate(verdict.auroc)),
            "chance": verdict.auroc["low"] <= 0.5 <= verdict.auroc["high"],
            "rates": [_share(rate) for rate in verdict.true_positive_rates],
            "accuracy": [f"{share:.1%}" for share in row.accuracy.values()],
        }
        for name, verdict in row.attacks.items()
    ]


def _canary_row(row: dict[str, Any]) -> dict[str, str]:
    guesses = row["guesses"]
    return {
        "epsilon": _epsilon(row["epsilon"]),
        "lower": number(row["lower"], 2),
        "upper": "none" if math.isinf(row["upper"]) else number(row["upper"], 2),
        "delta": f"{row['delta']:.1e}",
        "guesses": f"{guesses['right']} of {guesses['made']} guesses, {guesses['canaries']} canaries",
    }


def _inversion_row(row: Inversion) -> dict[str, Any]:
    return {
        "name": _view_name(row),
        "psnr": number(row.psnr, 1),
        "ssim": number(row.ssim, 2),
        "correlation": number(row.correlation, 2),
        "others": number(row.others, 2),
        "identified": _share(row.identified),
        "labels": _share(row.labels) if row.labels else {"number": "given", "span": ""},
        "tiles": [_tile(image) for image in row.reconstructions],
    }


def _view_name(row: Inversion) -> str:
    names = {
        PLAIN_VIEW: "plain update",
        MEAN_VIEW: f"mean over {len(row.reconstructions)} sites",
        MASKED_VIEW: "one masked update",
    }
    return names.get(row.view, f"update under DP, {_epsilon(row.epsilon)}")


def _share(share: Share) -> dict[str, str]:
    return {"number": f"{share['hits']} of {share['n']}", "span": f"{share['low']:.1%}{DASH}{share['high']:.1%}"}


def _epsilon(epsilon: float) -> str:
    return "no privacy" if math.isinf(epsilon) else f"ε = {epsilon:g}"


def _tile(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    grey = Image.fromarray(np.round(image.clip(0.0, 1.0) * 255.0).astype(np.uint8))
    grey.resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST).save(buffer, format="PNG")
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _readable(value: Any) -> Any:
    """`value` for JSON: infinities as text, NaN as null."""
    if isinstance(value, dict):
        return {key: _readable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(part) for part in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else without_nan(value)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
