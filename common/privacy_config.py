"""The sections of an experiment that protect patients and sites: noise at the sites, noise at the coordinator, and masks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config_types import Count, NonNegative, Positive, PrivacyUnit, Section


class PrivacyConfig(Section):
    """Differential privacy of each site's own training: DP-SGD (Abadi et al. 2016, algorithm 1) with Poisson sampling.

    Neighbouring data sets differ by one unit, added or removed. Sampling rate, noise, number of steps and accounting all come from
    these numbers and the site's own number of units (`client.privacy.plan`).
    """

    mechanism: Literal["none", "dp_sgd"] = "none"
    unit: PrivacyUnit = "patient"
    """What is protected: one `image`, or one `patient` with all images. Under `patient` each drawn patient gives one image, drawn anew."""
    target_epsilon: Positive = 6.0
    """Spent by each site over all planned rounds; becomes the noise multiplier before the first step."""
    noise_multiplier: Positive | None = None
    """Standard deviation of the noise over `max_grad_norm`. Set, it takes the place of `target_epsilon`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Unset it is 1 / training patients of the site."""
    max_grad_norm: Positive = 1.0
    """Each unit's gradient is clipped to this length."""
    expected_batch_size: Count = 256
    """Units drawn a step on average: the sampling rate is this over the site's units, 1 at most."""
    physical_batch_size: Count = 32
    """Images that are in memory at once; changes memory, speed, and which random views are drawn."""
    augmentation_multiplicity: Count = 1
    """Augmented views of an image whose gradients are averaged before they are clipped (De et al. 2022, section 3.4)."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the moving average of the weights over the steps of a round, which travels in place of the last ones; 0 is off."""
    accountant: Literal["prv", "rdp"] = "prv"
    secure_noise: bool = False
    """Noise and sampling come from a ChaCha20 key that the operating system draws for each round and nobody keeps, and each noise value
    is a sum of four, against the attack on floating point numbers (Holohan and Braghin 2021). Off, the key comes from the site's own
    secret and everything that the update depends on: the coordinator, who knows `seed`, cannot compute it, but the site repeats the
    round bit for bit, and who gets the secret and an update can subtract the noise. Publish what was trained with it on."""
    open_metrics: bool = False
    """Sends training loss, accuracy and images per second of private rounds too. They come from the raw data without any noise, so
    that the accounted epsilon does not hold for who sees them."""


class CentralPrivacyConfig(Section):
    """Differential privacy of whole sites, by a coordinator whom they trust with their updates: DP-FedAvg (McMahan et al. 2018).

    Neighbouring federations differ by one site, whose updates become zero. Every update weighs the same, whatever its site's size.
    """

    enabled: bool = False
    clip_norm: Positive = 1.0
    """Updates longer than this (L2 norm of the change of all parameters) are scaled down to it. About their median is a good choice."""
    target_epsilon: Positive = 8.0
    """Of all planned rounds together; becomes the noise multiplier before the first round."""
    noise_multiplier: Positive | None = None
    """Standard deviation of the noise on the sum of updates over `clip_norm`. Set, it takes the place of `target_epsilon`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1.0e-5


class SecureAggregationConfig(Section):
    """Secure aggregation (SecAgg+, Bell et al. 2020): the coordinator learns sums of the sites' updates and counts, and no single one."""

    enabled: bool = False
    threshold: Annotated[float, Field(gt=0.5, le=1.0)] = 0.67
    """Share of the sites (of each site's neighbours, where not all are) that must stay to the end, rounded up, at least three. So many
    sites together with the coordinator could read another's update; more than two thirds also withstands a coordinator that lies about
    who dropped out, with up to a third of the sites on its side (Bonawitz et al. 2017, section 6.2)."""
    clip_norm: Positive = 100.0
    """Longest update (L2 norm of the difference from the global weights) that a site sends; longer ones are scaled down and counted.
    Quantisation steps are proportional to it."""
    bits: Literal[32, 64] = 32
    """Of each masked parameter on the wire."""
    max_examples: Annotated[int, Field(ge=1, le=2**20)] = 65536
    """Most training images of one site; one that has more takes no part. Quantisation steps are proportional to it."""
    neighbours: Annotated[int, Field(ge=4, multiple_of=2)] | None = None
    """With how many others each site shares masks. Unset: with all up to 16 sites, beyond as many as `common.secure_sum.graph` needs."""
    stage_timeout_sec: Positive = 60.0
    """Deadline of each step besides training and evaluation, in which sites exchange keys and shares. Each starts a process at a site;
    a simulation of hundreds of hospitals on one machine needs more, since they answer one after the other."""
    grace_sec: NonNegative = 5.0
    """Once enough sites have answered the last two steps, so long is waited for the others."""
