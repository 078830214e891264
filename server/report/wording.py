"""The sentences of the report: what was trained where, what it found, and what it does not show."""

from __future__ import annotations

from pneumofed.common.config.classes import in_words
from pneumofed.common.errors import counted, in_a_row
from pneumofed.common.ops.study_code import describe_name, is_study_code
from pneumofed.server.report.numbers import ReportedEstimate, difference, hundred_span, number, of_hundred
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.runs.records import CENTRAL_SETS, set_noun
from pneumofed.server.runs.summary_records import MetricInterval

MODEL_NAMES = {
    "resnet18": "ResNet-18", "resnet34": "ResNet-34", "resnet50": "ResNet-50", "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0", "efficientnet_lite0": "EfficientNet-Lite0", "vgg16": "VGG-16",
    "small_cnn": "small convolutional network", "scattering": "linear classifier on scattering features",
    "imagenet_wavelets": "linear classifier on features of ImageNet and wavelets",
    "resnet18_slices": "ResNet-18 over slices", "densenet121_3d": "DenseNet-121 in three dimensions",
}  # fmt: skip
STRATEGY_NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "fedavgm": "FedAvgM", "fedexp": "FedExP",
    "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedbn": "FedBN",
    "fednova": "FedNova", "scaffold": "SCAFFOLD", "feddyn": "FedDyn",
    "fedmedian": "FedMedian", "fedtrimmedavg": "trimmed mean", "krum": "Krum", "multikrum": "Multi-Krum",
}  # fmt: skip
PARTITION_WORDS = {
    "iid": "each with the same mix of classes and the same size",
    "dirichlet": "each with its own mix of classes and size",
    "quantity": "each of its own size, with the same mix of classes",
    "scanner": "each with its own simulated scanner",
}
FEW_IMAGES = 50
"""Below so many images of a class one image moves sensitivity or specificity by more than two percentage points."""


def summary_sentences(run: StoredRun) -> list[str]:
    """Describes the run in a few plain sentences."""
    evaluated = [name for name in run.sets if run.results(name)]
    texts = [_training(run)]
    if evaluated:
        areas = "; ".join(_auroc(run, name) for name in evaluated)
        texts.append(f"{areas[0].upper()}{areas[1:]}. An AUROC of 0.5 is guessing, 1 is perfect.")
        texts.append(_operating_point(run, evaluated))
        texts += [_over_classes(run, name) for name in evaluated if len(run.classes) > 2]
    missing = [set_noun(name) for name in CENTRAL_SETS if name not in evaluated]
    if missing and len(evaluated) < len(CENTRAL_SETS):
        texts.append(
            f"No {' and no '.join(missing)} was judged, so the report holds no result for {'them' if len(missing) > 1 else 'it'}."
        )
    return texts


def _model_noun(name: str) -> str:
    """With its article, as a sentence begins."""
    noun = f"network of {describe_name(name).replace(' own ', ' own, ')}" if is_study_code(name) else MODEL_NAMES.get(name, name)
    return f"{'An' if noun[0] in 'AEIOU' else 'A'} {noun}"


def _training(run: StoredRun) -> str:
    sites, cfg = run.site_reports(), run.experiment
    model = _model_noun(cfg.model.name) if cfg else "A network"
    method = f" with {STRATEGY_NAMES.get(cfg.strategy.name, cfg.strategy.name)}" if cfg else ""
    method += ", and beside it each hospital's own model with Ditto" * bool(cfg and cfg.personal.is_on)
    where = f" in {counted(len(sites), 'simulated hospital' if run.virtual else 'hospital')}" if sites else ""
    if not run.completed:
        return f"{model} was to be trained{method}{where}, but no round was completed."
    images = sum(site.images or 0 for site in sites.values())
    patients = sum(site.patients or 0 for site in sites.values())
    noun = "CT volume" if cfg and cfg.image.slices else "chest radiograph"
    of_images = f" with {counted(images, noun)} of {counted(patients, 'patient')}" if images else ""
    ending = ". The images of each set were dealt to its hospitals" if run.virtual else "; no image left its hospital"
    kind = run.partition_kind
    ending += f", {PARTITION_WORDS[kind]}" if run.virtual and kind in PARTITION_WORDS else ""
    if cfg and cfg.strategy.ema_decay > 0:
        ending += ". Judged and kept is the moving average of its weights over the rounds"
    return f"{model} was trained{method} over {counted(run.completed, 'round')}{where}{of_images}{ending}."


def _auroc(run: StoredRun, central_set: str) -> str:
    found, size = run.results(central_set)["auroc"], run.size(central_set)
    of_patients = f" of {counted(size.patients, 'patient')}" if size.patients else ""
    value = with_interval(found, run.interval_name(central_set))
    return f"on the {set_noun(central_set)} ({counted(size.images, 'image')}{of_patients}) the AUROC is {value}"


def _over_classes(run: StoredRun, central_set: str) -> str:
    results, interval_name = run.results(central_set), run.interval_name(central_set)
    area = with_interval(results["auroc_macro"], interval_name)
    right = _hundred(results["accuracy_three_class"], interval_name)
    said = f"; for {right} of 100 images the most probable class is the true one" if right else ""
    names = in_a_row(run.classes)
    return f"Over {names}, the mean AUROC of each against the rest in the {set_noun(central_set)} is {area}{said}."


def _operating_point(run: StoredRun, evaluated: list[str]) -> str:
    parts, policy = [_found_and_cleared(run, name) for name in evaluated], run.threshold.policy if run.threshold else None
    text = f"At the threshold {number(run.threshold_value)}, {'; '.join(parts)}."
    target = run.experiment.evaluation.target if run.experiment and policy in ("sensitivity", "specificity") else None
    bounds = {set_noun(name): run.results(name)[str(policy)].high for name in evaluated} if target else {}
    if target and (missed := [noun for noun, high in bounds.items() if high is not None and high < target]):
        where = in_a_row(f"the {noun}" for noun in missed)
        text += f" It was chosen for a {policy} of {number(target, 2)}, which is clearly not reached in {where}: "
        text += "a hospital with such patients sets its own (pneumofed site operating-point)."
    return text


def _found_and_cleared(run: StoredRun, central_set: str) -> str:
    results = run.results(central_set)
    found = _hundred(results["sensitivity"], run.interval_name(central_set))
    cleared = _hundred(results["specificity"], run.interval_name(central_set))
    parts = [in_words(f"of 100 images with pneumonia it finds {found}", run.classes)] if found else []
    parts += [f"of 100 without it calls {cleared} normal"] if cleared else []
    return f"in the {set_noun(central_set)} " + (" and ".join(parts) or "sensitivity and specificity are undefined")


def _hundred(found: ReportedEstimate, interval_name: str) -> str:
    if found.value is None:
        return ""
    span = hundred_span(found)
    return of_hundred(found.value) + (f" ({interval_name} {span})" if span else " (no interval)")


def with_interval(found: ReportedEstimate, interval_name: str) -> str:
    """Formats a metric with its interval: `0.966 (95% CI 0.953–0.977)`.

    Args:
        found: the metric; undefined where the set has images of one class only.
        interval_name: `95% CI`, or as `StoredRun.interval_name` says.
    """
    if found.value is None:
        return "undefined (images of one class only)"
    return f"{found.number} ({interval_name} {found.span})" if found.span else f"{found.number} (no interval)"


def describe_drops(run: StoredRun) -> list[str]:
    """Describes how the metrics change from the first set, as a rule the test set, to each other one; empty of one set alone."""
    first, *others = [name for name in run.sets if run.results(name)] or [""]
    metrics = {"auroc": "AUROC", "sensitivity": "sensitivity", "specificity": "specificity"}
    return [
        _describe_change(
            metric, (first, other), difference(run.results(other)[key], run.results(first)[key]), run.interval_name(other)
        )
        for other in others
        for key, metric in metrics.items()
    ]


def _describe_change(metric: str, sets: tuple[str, str], change: ReportedEstimate, interval_name: str) -> str:
    """The change of a metric from one set to the other; one whose interval holds 0 is not reported as one."""
    first, other = map(set_noun, sets)
    if change.value is None:
        return f"The change of {metric} is undefined."
    size = f"{number(abs(change.value))} {'lower' if change.value < 0 else 'higher'}"
    if not change.span:
        return f"On the {other} {metric} is {size} than on the {first} (no interval)."
    interval = f"change {change.number}, {interval_name} {change.span}"
    if change.clear:
        return f"On the {other} {metric} is {size} than on the {first} ({interval})."
    return f"The {first} and the {other} do not clearly differ in {metric} ({interval})."


def warn_of_few(run: StoredRun) -> list[str]:
    """Writes a warning for each evaluated set with few images of a class."""
    warnings = []
    for name in run.sets:
        size = run.size(name)
        few = [
            f"{counted(n, 'image')} {in_words(text, run.classes)}"
            for n, text in ((size.normal, "without pneumonia"), (size.pneumonia, "with pneumonia"))
            if n < FEW_IMAGES
        ]
        if few and run.results(name):
            told = f"The {set_noun(name)} has only {in_a_row(few)}"
            warnings.append(f"{told}: what rests on these is uncertain, as the intervals show.")
    return warnings


def describe_policy(run: StoredRun) -> str:
    """Describes how the threshold is chosen, as part of a sentence."""
    policy = run.threshold.policy if run.threshold else None
    target = f"{100 * run.experiment.evaluation.target:g}%" if run.experiment else "its target"
    texts = {
        "half": "fixed at 0.5",
        "youden": "chosen for the highest sum of sensitivity and specificity (Youden's index)",
        "sensitivity": f"chosen for a sensitivity of at least {target}",
        "specificity": f"chosen for a specificity of at least {target}",
    }
    return texts.get(str(policy), "chosen")


def limits(run: StoredRun) -> list[str]:
    """Writes four sentences on what the results must not be used for."""
    return [
        "This is research software and no medical device: nothing here was tested in the care of patients, so it must decide about none.",
        _limit_of_images(run),
        _limit_of_external(run),
        f"The threshold was {describe_policy(run)} on the hospitals' own validation images: with another "
        f"{in_words('share of pneumonia', run.classes)} or other machines sensitivity and specificity change, so it must be chosen anew "
        "before any use (pneumofed site operating-point).",
    ]


def _limit_of_images(run: StoredRun) -> str:
    if run.summary.phantom:
        return "The images are drawn by a program: they exercise the software and say nothing about patients."
    return (
        "The public data set this software was built around (Kermany et al. 2018) shows children of one to five years from a single "
        "centre: a model trained on it can fail without a sign on adults, other machines or other diseases."
    )


def _limit_of_external(run: StoredRun) -> str:
    if not (foreign := run.foreign_sets):
        return "No set that is known to be of other hospitals was judged, so how the model does in a hospital that took no part is unknown."
    sizes = {name: size for name in [*foreign, "test"] if (size := run.size(name)).images}
    shares = [
        f"{100 * size.pneumonia / size.images:.0f}% of {size.images:,} in the {set_noun(name)}" for name, size in sizes.items()
    ]
    return (
        f"Of another origin than the training images: {in_a_row(f'the {set_noun(name)}' for name in foreign)}. The "
        f"{in_words('share of pneumonia', run.classes)} is {', '.join(shares)}: accuracy, precision and calibration cannot be compared "
        "between them, and a result there is a first test of transfer, no proof."
    )


def describe_lead(lead: MetricInterval | None, other: str, interval_name: str) -> str:
    """Describes the federated model's lead in AUROC over another one; empty without one.

    Args:
        lead: AUROC of the federated model minus that of the other, paired over patients.
        other: what the other model is, as part of a sentence.
        interval_name: `95% CI`, or as `StoredRun.interval_name` says.
    """
    found = ReportedEstimate.of(lead)
    if found.value is None:
        return ""
    interval = f"{interval_name} {found.span}" if found.span else "no interval"
    if not found.clear:
        return f"Federated and {other} cannot be told apart (AUROC difference {found.number}, {interval})."
    return f"Federated training is {'better' if found.value > 0 else 'worse'} than {other}: AUROC difference {found.number} ({interval})."
