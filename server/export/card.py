"""The model card: Mitchell et al. 2019, "Model Cards for Model Reporting", section 4, heading by heading."""

from __future__ import annotations

from collections.abc import Sequence

from common.model_bundle.manifest import (
    BundleManifest,
    CardFacts,
    IntervalEstimate,
    Measured,
    PrivacySpent,
    Provenance,
    Quantization,
)
from server.report_numbers import DASH, number, whole

PHANTOM = "**These are drawn images (phantoms): the numbers below say nothing about patients.**"
LIMITS = (
    "It is a result of research and no medical device. A physician decides; the model is one more opinion, and may be wrong with "
    "high probability on its side.",
    "It was trained to tell pneumonia from normal frontal chest radiographs. It knows no other disease: an image with another finding "
    "may be called either.",
    "The operating point and the calibrated probability hold for patients like those of the validation set: the same ages, scanners, and "
    "about the same share of pneumonia. Where that share differs, the probability is too high or too low.",
    "The interval of a probability tells how well the validation patients determine the calibration. It does not tell how different "
    "a new hospital is: see the external results.",
    "It is not to be used on lateral views, on photographs of films or screens, or on parts of the body other than the chest; the "
    "suitability check refuses many of these, but not all.",
)
_NAMES = {
    "auroc": "AUROC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "ece": "calibration error",
    "brier": "Brier score",
    "log_loss": "log loss",
    "accuracy_three_class": "accuracy, three classes",
    "auroc_macro": "AUROC, mean over classes",
}
_CALIBRATION_METRICS = ("ece", "brier", "log_loss")


def write_card(manifest: BundleManifest) -> str:
    """The card of `manifest` as Markdown: every number with its 95 % interval and the set that it was measured on."""
    facts = manifest.card
    parts = [
        f"# Model card: {manifest.name}",
        PHANTOM if facts.phantom else "",
        _details(manifest),
        _use(),
        _factors(),
        _metrics(manifest),
        _evaluation_data(facts),
        _training_data(facts),
        _results(manifest),
        _privacy(facts.privacy),
        _provenance(facts.provenance),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _details(manifest: BundleManifest) -> str:
    step, facts = manifest.preprocessing, manifest.card
    onnx = facts.onnx
    check = (
        f"The ONNX graph was compared with PyTorch on {whole(onnx.images)} images: no probability differs by more than "
        f"{onnx.probability:.1e}."
        if onnx
        else ""
    )
    return f"""## Model details

- {manifest.model.name}, {step.in_channels} input channel(s), {manifest.model.norm} norm; classes: {", ".join(manifest.classes)}.
- Made {manifest.created:%Y-%m-%d} by federated learning; no image left its hospital.
- Input: the whole radiograph, aspect ratio kept ({step.fit}), {step.size_px} x {step.size_px} pixels, 256 grey levels, mean \
{", ".join(f"{value:g}" for value in step.mean)}, deviation {", ".join(f"{value:g}" for value in step.std)}; DICOM files with \
{"their own window" if step.window is None else f"the window {step.window.center:g} / {step.window.width:g}"}.
- {check}"""


def _use() -> str:
    lines = "\n".join(f"- {sentence}" for sentence in LIMITS)
    return f"## Intended use and its limits\n\n{lines}"


def _factors() -> str:
    return """## Factors

Age, sex, projection (PA or AP), scanner and its processing, and the share of pneumonia among those who are examined. Results by group are
below where the coordinator's manifests know the group; nothing is known of the groups that are not listed."""


def _metrics(manifest: BundleManifest) -> str:
    point, fit = manifest.threshold, manifest.calibration
    policy = {
        "half": "at a probability of one half of the uncalibrated network",
        "youden": "for the highest sum of sensitivity and specificity",
        "sensitivity": f"for a sensitivity of at least {point.target:g}",
        "specificity": f"for a specificity of at least {point.target:g}",
    }[point.policy]
    return f"""## Metrics and decisions

An image is called pneumonia if its calibrated probability is at least {point.value:.3f} ({
        point.raw_value:.3f} before calibration). The threshold \
was chosen {policy} on the hospitals' pooled validation patients and applied to all other sets unchanged.

{_calibration_words(manifest)}

Intervals are of 95 %: by bootstrap over patients for the test and external sets, approximate ones (Wilson, Newcombe) for validation \
and groups. Calibration error is the expected one over 15 bins (Naeini et al. 2015){
        "." if fit.method == "none" else "; that of validation is measured on the patients that the calibration was fitted on."
    }"""


def _calibration_words(manifest: BundleManifest) -> str:
    fit = manifest.calibration
    if fit.method == "none":
        return f"**The probability is not calibrated** ({fit.fitted_on}): it is the network's own, and has no interval."
    both = " It spans two fits, with and without a bias." if len(fit.lines) > 1 else ""
    bias = f" and a bias of {fit.intercept:+.3f}" if fit.method == "temperature_and_bias" else ""
    return (
        f"Calibration: logits divided by the temperature {fit.temperature:.3f}{bias}, fitted on {fit.fitted_on} ({whole(fit.positives)} of "
        f"{whole(fit.images)} with pneumonia). Its interval takes {fit.design_effect:.2f} images as one, since "
        f"images of one patient are alike.{both}"
    )


def _evaluation_data(facts: CardFacts) -> str:
    rows = [
        [found.name, whole(found.images), whole(found.patients), whole(found.positives)]
        for found in facts.measured
        if "," not in found.name
    ]
    if not rows:
        return "## Evaluation data\n\nThe run had no set to be judged on."
    return f"""## Evaluation data

{_table(["set", "images", "patients", "with pneumonia"], rows)}

`validation`: patients of the training hospitals who were not trained on (internal). `test`: the coordinator's own set. `external`: a set \
of another place, which no choice was made on."""


def _training_data(facts: CardFacts) -> str:
    whose = f"{whole(facts.sites)} hospital(s)" + (", simulated on one machine" if facts.virtual else "")
    if facts.training_images is None:
        return f"## Training data\n\nRadiographs of {whose}, which told no single counts."
    classes = ", ".join(f"{whole(n)} {name}" for name, n in facts.training_classes.items())
    return (
        f"## Training data\n\n{whole(facts.training_images)} training radiographs of {whose}; with those kept for validation "
        f"{whole(facts.training_patients)} patients ({classes} images)."
    )


def _results(manifest: BundleManifest) -> str:
    facts = manifest.card
    whole_sets = [found for found in facts.measured if "," not in found.name]
    groups = [found for found in facts.measured if "," in found.name]
    parts = ["## Quantitative analyses"]
    if whole_sets:
        parts.append(f"### All images\n\n{_metric_table(whole_sets)}")
    before = [found for found in facts.uncalibrated if found.metrics.get("ece")]
    if before and manifest.calibration.method != "none":
        parts.append(f"### Before calibration\n\n{_metric_table(before, _CALIBRATION_METRICS)}")
    if groups:
        parts.append(f"### By group\n\n{_metric_table(groups, ('auroc', 'sensitivity', 'specificity', 'ece'))}")
    else:
        parts.append(
            "### By group\n\nThe manifests of the sets know neither sex nor age nor view: nothing is known of any group."
        )
    parts.append(_quantization(facts.quantization))
    return "\n\n".join(parts)


def _quantization(found: Sequence[Quantization]) -> str:
    if not found:
        return "### int8\n\nThe bundle has no int8 graph."
    rows = [
        [
            one.name,
            whole(one.images),
            _cell(one.auroc_float32),
            _cell(one.auroc_int8),
            f"{one.mean_difference:.4f}",
            f"{one.max_difference:.3f}",
            whole(one.changed_decisions),
        ]
        for one in found
    ]
    head = ["set", "images", "AUROC float32", "AUROC int8", "mean difference", "largest difference", "decisions changed"]
    return f"### int8\n\nDifferences are of the calibrated probability.\n\n{_table(head, rows)}"


def _privacy(told: PrivacySpent | None) -> str:
    if told is None:
        return ""
    epsilon = (
        [] if told.largest_epsilon is None else [f"The largest epsilon that a hospital told is {number(told.largest_epsilon)}."]
    )
    none = (
        []
        if told.protected
        else ["Nothing was protected by noise or masks; images and patients' names never left the hospitals."]
    )
    protected = "\n".join(f"- {sentence}" for sentence in (*told.protected, *epsilon, *none))
    left = "\n".join(f"- {thing}" for thing in told.unprotected)
    return f"## Privacy\n\n{protected}\n\nWhat left the hospitals without noise and without masks:\n\n{left}"


def _provenance(found: Provenance | None) -> str:
    if found is None:
        return ""
    dirty = " (with uncommitted changes)" if found.git_dirty else ""
    rows = [
        ["run", f"`{found.run}`, round {found.round}"],
        ["checkpoint (SHA-256)", f"`{found.checkpoint}`"],
        ["configuration (SHA-256)", f"`{found.config}`"],
        ["code (git)", f"`{found.git_commit}`{dirty}" if found.git_commit else DASH],
        ["app that the hospitals approved (SHA-256)", f"`{found.app_bundle}`" if found.app_bundle else DASH],
        ["exported by", f"pneumofed {found.pneumofed}"],
    ]
    return f"## Provenance\n\n{_table(['what', 'which'], rows)}"


def _metric_table(found: Sequence[Measured], wanted: Sequence[str] = tuple(_NAMES)) -> str:
    shown = [name for name in wanted if any(name in one.metrics for one in found)]
    rows = [
        [
            f"{one.name} ({whole(one.images - one.positives)} + {whole(one.positives)})",
            *(_cell(one.metrics.get(name)) for name in shown),
        ]
        for one in found
    ]
    return _table(["set (normal + pneumonia)", *(_NAMES[name] for name in shown)], rows)


def _cell(estimate: IntervalEstimate | None) -> str:
    if estimate is None or estimate.value is None:
        return DASH
    span = f" ({number(estimate.low)}{DASH}{number(estimate.high)})" if estimate.low is not None else ""
    return number(estimate.value) + span


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
