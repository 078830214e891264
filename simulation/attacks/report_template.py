"""The page of the attack bench as a Jinja2 template."""

PAGE = """\
{%- macro estimate(found) -%}
{{ found.number }}{% if found.span %}<small>{{ found.span }}</small>{% endif %}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ bench.experiment.name }} – pneumofed attack bench</title>
<style>{{ style }}
.tiles-row td { padding: .2rem .35rem .2rem 0; }
.tiles-row img { width: 96px; height: 96px; image-rendering: pixelated; display: block; }
</style>
</head>
<body>
<header class="top">
<p class="kicker">pneumofed: attacks on trained models and updates</p>
<h1>{{ bench.experiment.name }}</h1>
<p class="meta">{{ bench.experiment.model.name }}, {{ bench.experiment.image.size_px }} px, one site of {{ patients }} patients with
{{ bench.site | length }} images{% if bench.others %} in a federation of {{ bench.cfg.hospitals }} such sites, whose released model is
attacked{% endif %}, seed {{ bench.cfg.seed }}</p>
<div class="box warn" role="note"><p><strong>
{%- if bench.phantom %}All images here were drawn by a program.{% else %}The images here come from the folder that this bench was
given.{% endif %}</strong> The bench trains and attacks its own simulated hospital. It never sees the update or an image of a real
one, and no page of it may show one.{% if bench.phantom %} The numbers say nothing about patients.{% endif %}</p></div>
</header>
<main>
{% if membership_rows %}
<section aria-labelledby="membership">
<h2 id="membership">Was this patient in the training data?</h2>
<p>The attacker has the trained model and a patient's images, and knows the recipe. For each epsilon {{ bench.cfg.models }} models
were trained on random halves of the patients; each was attacked with the others as shadows. 0.5 is guessing;
where the interval holds it, the attack cannot be told from it.</p>
<div class="scroll" role="region" aria-label="Membership inference" tabindex="0">
<table class="wide dense">
<caption>Members against others, by patient: AUROC with the 95% interval over resampled patients, and the members found where that
share of the {{ others }} others is falsely accused, with Clopper-Pearson intervals; "right" are the images whose
true class gets more than half of the confidence.
</caption>
<thead><tr><th scope="col">Training</th><th scope="col">Attack</th><th scope="col" class="n">AUROC</th><th scope="col">Guessing?</th>
{%- for rate in rates %}<th scope="col" class="n">Found at {{ rate }}</th>{% endfor %}
<th scope="col" class="n">Right, members</th><th scope="col" class="n">Right, others</th></tr></thead>
<tbody>{% for row in membership_rows %}
<tr><th scope="row">{{ row.epsilon }}{% if row.noise %}<small>{{ row.noise }}</small>{% endif %}</th><td>{{ row.attack }}</td>
<td class="n">{{ estimate(row.auroc) }}</td>
<td>{{ 'perhaps' if row.chance else 'no' }}</td>
{%- for rate in row.rates %}<td class="n">{{ estimate(rate) }}</td>{% endfor %}
{% for share in row.accuracy %}<td class="n">{{ share }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<div class="pictures"><figure><img src="{{ roc }}" width="1200" height="900"
alt="ROC curves of the membership attacks on logarithmic axes; their areas are in the table above.">
<figcaption>Logarithmic axes: what matters is how many members are found with few false accusations. Grey: guessing.</figcaption>
</figure></div>
</section>
{% endif %}

{% if canary_rows %}
<section aria-labelledby="canaries">
<h2 id="canaries">How much privacy was lost at least?</h2>
<p>{{ bench.cfg.canaries }} {{ 'mislabelled images' if bench.cfg.canary_kind == 'mislabelled' else 'random patterns' }} were each put
into the training data or left out by the toss of a coin. How well the model's confidence tells which, bounds epsilon from below
(Steinke, Nasr and Jagielski 2023), at 95% confidence; the accountant bounds it from above. A lower bound above the upper one would be
a bug. A low lower bound proves nothing: a better attacker may learn more.</p>
<div class="scroll" role="region" aria-label="Canaries" tabindex="0">
<table><caption>Epsilon, measured and accounted, at the delta of the run and at a small one, where the run has a larger epsilon and the
audit sees more.</caption>
<thead><tr><th scope="col">Training</th><th scope="col" class="n">At least</th><th scope="col" class="n">At most</th>
<th scope="col" class="n">Delta</th><th scope="col">Right</th></tr></thead>
<tbody>{% for row in canary_rows %}
<tr><th scope="row">{{ row.epsilon }}</th><td class="n">{{ row.lower }}</td><td class="n">{{ row.upper }}</td>
<td class="n">{{ row.delta }}</td><td>{{ row.guesses }}</td></tr>
{% endfor %}</tbody></table></div>
</section>
{% endif %}

{% if inversion_rows %}
<section aria-labelledby="inversion">
<h2 id="inversion">Can an image be read from an update?</h2>
<p>The attacker is the server. It sees one hospital's training step on one image, knows the model, the loss and the step, and looks for
the image whose gradient points the same way (Geiping et al. 2020). This is the attacker's best case: a real round is many steps on
many augmented images{% if bench.cfg.fixed_norms %}, and the network's own normalisation is replaced by one that stands still, which
lets more of the image through{% endif %}.</p>
<div class="scroll" role="region" aria-label="Reconstructions" tabindex="0">
<table class="tiles-row"><caption>The attacked images, and what was reconstructed from each view of their update.</caption>
<tbody>
<tr><th scope="row">the image</th>{% for tile in originals %}<td><img src="{{ tile }}" alt="attacked image {{ loop.index }}"></td>
{%- endfor %}</tr>
{% for row in inversion_rows %}
<tr><th scope="row">{{ row.name }}</th>{% for tile in row.tiles %}
<td><img src="{{ tile }}" alt="reconstruction of image {{ loop.index }} from: {{ row.name }}"></td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<div class="scroll" role="region" aria-label="Likeness" tabindex="0">
<table class="wide"><caption>Means over the images. Identified: the reconstruction correlates more with its image than with any other of
the site's {{ candidates }} (Clopper-Pearson intervals). Labels were inferred from the last bias (Zhao et al. 2020), in the mean over
sites given.</caption>
<thead><tr><th scope="col">What the server sees</th><th scope="col" class="n">PSNR (dB)</th><th scope="col" class="n">SSIM</th>
<th scope="col" class="n">Correlation</th><th scope="col" class="n">with the likest other</th><th scope="col" class="n">Identified</th>
<th scope="col" class="n">Labels</th></tr></thead>
<tbody>{% for row in inversion_rows %}
<tr><th scope="row">{{ row.name }}</th><td class="n">{{ row.psnr }}</td><td class="n">{{ row.ssim }}</td>
<td class="n">{{ row.correlation }}</td><td class="n">{{ row.others }}</td><td class="n">{{ estimate(row.identified) }}</td>
<td class="n">{{ estimate(row.labels) }}</td></tr>
{% endfor %}</tbody></table></div>
</section>
{% endif %}

<section aria-labelledby="limits">
<h2 id="limits">What this does not prove</h2>
<ul class="text">
<li>An attack that fails proves nothing about a better one. Only the accountant's epsilon bounds every attacker.</li>
<li>An attack that succeeds does so in the attacker's best case: few patients, a small network, nothing that hides a patient in a
crowd.</li>
<li>Secure aggregation hides one site's update among the others; what their sum and the trained model tell, it does not hide.</li>
</ul>
</section>
</main>
<footer>Written by pneumofed's attack bench. Numbers without pictures: attack.json.</footer>
</body>
</html>
"""
