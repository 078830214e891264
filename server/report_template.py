"""The report's page as a Jinja2 template; a Python string, since a Flower app's bundle takes no HTML files."""

PAGE = """\
{%- macro estimate(found) -%}
{{ found.number }}{% if found.span %}<small>{{ found.span }}</small>{% endif %}
{%- endmacro -%}
{%- macro texts(items) -%}
{% if items %}<ul>{% for item in items %}<li>{{ item }}</li>{% endfor %}</ul>{% else %}–{% endif %}
{%- endmacro -%}
{%- macro tiles(shown, kind) -%}
<dl class="tiles {{ kind }}">
{% for tile in shown %}
<div class="tile"><dt>{{ tile.label }}</dt><dd class="value">{{ tile.value }}</dd><dd class="under">{{ tile.note }}</dd></div>
{% endfor %}
</dl>
{%- endmacro -%}
{%- macro pictures(drawn) -%}
{% if drawn %}<div class="pictures">
{% for picture in drawn %}
<figure><img src="{{ picture.uri }}" width="1200" height="900" alt="{{ picture.text }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
</div>{% endif %}
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="pneumofed {{ version }}">
<title>{{ run.name }} – pneumofed report</title>
<style>{{ style }}</style>
</head>
<body>
<header class="top">
<p class="kicker">pneumofed: report of a federated study of pneumonia on chest radiographs</p>
<h1>{{ run.name }}</h1>
<p class="meta"><span class="badge {{ ending.status }}">{{ ending.badge }}</span> Written on {{ written }}</p>
{% if run.summary.phantom %}
<div class="box warn" role="note"><p><strong>These are drawn images.</strong> All radiographs of this run were drawn by a program to try
out
the software. The numbers below say nothing about patients.</p></div>
{% endif %}
{% if ending.reason %}
<section class="box {{ 'bad' if ending.status == 'failed' else 'warn' }}" aria-label="How the run ended">
<p><strong>{{ ending.badge }}.</strong> {{ ending.reason }}</p>
{% if ending.sites %}<ul class="text">{% for site in ending.sites %}<li>{{ site }}</li>{% endfor %}</ul>{% endif %}
{% if ending.advice %}<p><strong>What to do</strong></p>
<ul class="text">{% for advice in ending.advice %}<li>{{ advice }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endif %}
{% if run.problems %}
<section class="box warn" aria-label="Damaged files"><p><strong>Parts of the run folder cannot be read</strong> and are missing below:</p>
<ul class="text">{% for problem in run.problems %}<li>{{ problem }}</li>{% endfor %}</ul></section>
{% endif %}
<nav aria-label="Sections"><ul>
<li><a href="#summary">Summary</a></li>
{% if metric_rows %}<li><a href="#results">Results</a></li>{% endif %}
{% if course_pictures %}<li><a href="#rounds">Over rounds</a></li>{% endif %}
<li><a href="#hospitals">Hospitals</a></li>
{% if comparisons or untrained %}<li><a href="#baselines">Baselines</a></li>{% endif %}
{% if privacy %}<li><a href="#privacy">Privacy</a></li>{% endif %}
<li><a href="#course">What happened</a></li>
<li><a href="#data">Data</a></li>
<li><a href="#again">How to reproduce</a></li>
<li><a href="#limits">Limits</a></li>
</ul></nav>
</header>
<main>
<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<div class="lead">{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}</div>
{% for warning in few %}<p class="note">{{ warning }}</p>{% endfor %}
{% for name in judged %}{{ tiles(result_tiles(run, name), "three") }}{% endfor %}
{{ tiles(run_tiles, "") }}
</section>

{% if metric_rows %}
<section aria-labelledby="results">
<h2 id="results">Results</h2>
<p>The threshold is {{ run.threshold_value | number }}: {{ policy }} on the hospitals' pooled validation
images{{ validation_size }}, then
applied to the sets below as it is. On validation it gives a sensitivity of {{ validation.sensitivity | bracketed }} and a specificity of
{{ validation.specificity | bracketed }}; the AUROC there is {{ validation.auroc | bracketed }}.</p>
{% if run.threshold and run.threshold.reason_of_fallback %}
<div class="box warn"><p>The threshold could not be chosen as asked, since {{ run.threshold.reason_of_fallback }}; it is 0.5
instead.</p></div>
{% endif %}
{% if provisional %}
<div class="box warn"><p>The run did not reach its final evaluation. These are results of round {{ run.reported_line.round }}, the best
that was
judged, with approximate intervals from counts.</p></div>
{% endif %}
<div class="scroll" role="region" aria-label="Metrics" tabindex="0">
<table class="wide results">
<caption>Metrics with {{ interval_note }}. An image is called pneumonia if its predicted probability reaches the threshold.</caption>
<thead><tr><th scope="col">Metric</th>{% for name in judged %}<th scope="col" class="n">{{ sets[name] | capitalize }}
<small>{{ run.size(name).images | whole }} images{% if run.size(name).patients %} of {{ run.size(name).patients | whole }}
patients{% endif %}</small>
<small>{{ run.size(name).normal | whole }} normal, {{ run.size(name).pneumonia | whole }} pneumonia</small></th>{% endfor %}</tr></thead>
<tbody>
{% for row in metric_rows %}
<tr><th scope="row">{{ row.name }}{% if row.meaning %}<small>{{ row.meaning }}</small>{% endif %}</th>
{%- for found in row.estimates %}<td class="n">{{ estimate(found) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if drops %}
<h3>From the test set to the external set</h3>
<ul class="text">{% for drop in drops %}<li>{{ drop }}</li>{% endfor %}</ul>
<p class="note">Intervals of the changes follow from those of the two sets, taken as independent (Zou and Donner 2008).</p>
{% endif %}
{{ pictures(result_pictures) }}
</section>
{% endif %}

{% if course_pictures %}
<section aria-labelledby="rounds">
<h2 id="rounds">Over rounds</h2>
<p>The model of round {{ run.kept_round }} was kept: the latest whose validation AUROC is within one standard error of the highest. The
test and external sets had no part in that choice.</p>
{{ pictures(course_pictures) }}
</section>
{% endif %}

<section aria-labelledby="hospitals">
<h2 id="hospitals">Hospitals</h2>
{% if hospital_rows %}
{% if partition %}<p>{{ partition }}</p>{% endif %}
{% if spread %}<p>{{ spread }}</p>{% endif %}
{{ pictures(hospital_pictures) }}
{% if hospital_rows | length > 25 %}<details><summary>All {{ hospital_rows | length }} hospitals</summary>{% endif %}
<div class="scroll" role="region" aria-label="Hospitals" tabindex="0">
<table class="wide dense">
<caption>Images and patients that each hospital used, its part in the rounds, and the AUROC of the model of round {{ run.kept_round }} on
its
own validation images, normal + pneumonia (95% CI from counts, Newcombe 2006; images of one patient count as independent).</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col" class="n">Images</th><th scope="col" class="n">Patients</th>
{%- for label in class_names %}<th scope="col" class="n">{{ label | capitalize }}</th>{% endfor %}
<th scope="col" class="n">Training</th><th scope="col" class="n">Validation</th><th scope="col" class="n">Validation AUROC</th>
<th scope="col" class="n">Rounds trained</th><th scope="col" class="n">Rounds failed</th><th scope="col">Left out and
warnings</th></tr></thead>
<tbody>
{% for row in hospital_rows %}
<tr><th scope="row" class="name">{{ row.name }}</th><td class="n">{{ row.images }}</td><td class="n">{{ row.patients }}</td>
{%- for n in row.classes %}<td class="n">{{ n }}</td>{% endfor %}
<td class="n">{{ row.train }}</td><td class="n">{{ row.validation }}</td>
<td class="n">{{ estimate(row.auroc) }}{% if row.judged %}<small>{{ row.judged }}</small>{% endif %}</td>
<td class="n">{{ row.rounds }}</td><td class="n">{{ row.failures }}</td><td class="long">{{ texts(row.skipped) }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if hospital_rows | length > 25 %}</details>{% endif %}
{% else %}<p>No hospital has told anything yet.</p>{% endif %}
{% if absent %}
<h3>Not part of the run</h3>
<ul class="text">{% for name, reason in absent.items() %}<li><strong>{{ name }}</strong>: {{ reason }}</li>{% endfor %}</ul>
{% endif %}
</section>

{% if comparisons or untrained %}
<section aria-labelledby="baselines">
<h2 id="baselines">Was federation worth it?</h2>
<p>Each baseline follows the same recipe, with as many passes over its own training images and the same rule for the round and the
threshold: one model on the images of all hospitals in one place, which federation tries to match without moving an image, and one in each
hospital alone.</p>
{% for comparison in comparisons %}
<h3>{{ comparison.noun | capitalize }}</h3>
{% if comparison.leads %}<ul class="text">{% for lead in comparison.leads %}<li>{{ lead }}</li>{% endfor %}</ul>{% endif %}
<div class="scroll" role="region" aria-label="Baselines on the {{ comparison.noun }}" tabindex="0">
<table class="wide">
<caption>On the {{ comparison.noun }}, with {{ comparison.interval_name }}; of the mean, the range over hospitals instead.</caption>
<thead><tr><th scope="col">Training</th><th scope="col" class="n">AUROC</th><th scope="col" class="n">Accuracy</th>
<th scope="col" class="n">Sensitivity</th><th scope="col" class="n">Specificity</th></tr></thead>
<tbody>
{% for row in comparison.rows %}
<tr><th scope="row">{{ row.name }}</th>
{%- for found in row.estimates %}<td class="n">{{ estimate(found) }}{% if row.ranges %}
<small>{{ row.ranges[loop.index0] }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{{ pictures(baseline_pictures) }}
{% if comparisons %}<p class="note">Best and worst hospital are those of the highest and lowest AUROC on the same set, so the best one is
favoured by the choice. Leads are paired: both models see the same resampled patients.</p>{% endif %}
{% if untrained %}<h3>Baselines without a result</h3>
<ul class="text">{% for name, reason in untrained.items() %}<li><strong>{{ name }}</strong>: {{ reason }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endif %}

{% if privacy %}
<section aria-labelledby="privacy">
<h2 id="privacy">Privacy</h2>
{% for sentence in privacy.protected %}<p>{{ sentence }}</p>{% endfor %}
<p>No image and no name left a hospital. {{ "These" if privacy.protected else "Nothing was noised or masked, so these" }} left as they
are, and could tell something about the patients they were computed from:</p>
<ul class="text">{% for thing in privacy.unprotected %}<li>{{ thing }}</li>{% endfor %}</ul>
{% if privacy.spent %}
<div class="scroll" role="region" aria-label="Privacy spent" tabindex="0">
<table><caption>Epsilon that each hospital spent in this run, by its own account; what it spent in other runs stays with it.</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col" class="n">Epsilon</th></tr></thead>
<tbody>{% for name, epsilon in privacy.spent.items() %}
<tr><th scope="row" class="name">{{ name }}</th><td class="n">{{ epsilon | number }}</td></tr>{% endfor %}</tbody></table></div>
{% endif %}
</section>
{% endif %}

<section aria-labelledby="course">
<h2 id="course">What happened</h2>
<p>{{ course }}</p>
{% if incidents %}
<div class="scroll" role="region" aria-label="Incidents" tabindex="0">
<table><caption>Replies that did not come, and replies that were left out of the average.</caption>
<thead><tr><th scope="col">Site</th><th scope="col">What</th><th scope="col">Reason</th><th scope="col">Rounds</th></tr></thead>
<tbody>{% for row in incidents %}
<tr><th scope="row">{{ row.site }}</th><td>{{ row.what }}</td><td>{{ row.reason }}</td><td>{{ row.rounds }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if run.history %}
<details><summary>Every round in numbers</summary>
<div class="scroll" role="region" aria-label="Rounds" tabindex="0">
<table class="wide">
<caption>AUROC of each round's model, without intervals: nothing was chosen on them but the round with the highest validation
AUROC.</caption>
<thead><tr><th scope="col" class="n">Round</th><th scope="col" class="n">Good replies</th><th scope="col" class="n">Validation</th>
<th scope="col" class="n">Test</th><th scope="col" class="n">External</th><th scope="col" class="n">Threshold</th>
<th scope="col" class="n">Train (s)</th><th scope="col" class="n">Aggregate (s)</th><th scope="col" class="n">Evaluate (s)</th>
<th scope="col" class="n">Central (s)</th><th scope="col" class="n">Round (s)</th><th scope="col" class="n">Down (MB)</th>
<th scope="col" class="n">Up (MB)</th></tr></thead>
<tbody>{% for line in run.history %}
<tr><th scope="row" class="n">{{ line.round }}</th><td class="n">{{ line.trained | length }} of {{ line.drawn | length }}</td>
{%- for found in (line.validation, line.test, line.external) %}
<td class="n">{{ (found.auroc if found else none) | number }}</td>{% endfor %}
<td class="n">{{ (line.threshold.value if line.threshold else none) | number }}</td>
{%- for part in ('train', 'aggregate', 'evaluate', 'central', 'total') %}
<td class="n">{{ line.seconds[part] | number(1) }}</td>{% endfor %}
<td class="n">{{ (line.bytes.down / 1e6) | number(1) }}</td><td class="n">{{ (line.bytes.up / 1e6) | number(1) }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
</section>

<section aria-labelledby="data">
<h2 id="data">The data</h2>
{% if data_rows %}
<div class="scroll" role="region" aria-label="Data" tabindex="0">
<table class="wide"><caption>Images found and used; the rest were left out, each for a reason.</caption>
<thead><tr><th scope="col">Data</th><th scope="col" class="n">Found</th><th scope="col" class="n">Used</th>
<th scope="col" class="n">Patients</th>
<th scope="col">Used images by class</th><th scope="col">Left out and warnings</th></tr></thead>
<tbody>{% for row in data_rows %}
<tr><th scope="row">{{ row.name | capitalize }}</th><td class="n">{{ row.found }}</td><td class="n">{{ row.used }}</td>
<td class="n">{{ row.patients }}</td><td class="counts">{{ texts(row.classes) }}</td><td class="long">{{ texts(row.notes) }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>No data were counted before the run ended.</p>{% endif %}
</section>

<section aria-labelledby="again">
<h2 id="again">How to reproduce</h2>
<dl class="facts">
<dt>Seed</dt><dd>{{ seed }}</dd>
{% if parent %}<dt>Started from</dt><dd>{{ parent }}</dd>{% endif %}
<dt>Code</dt><dd>{{ code }}</dd>
<dt>Package</dt><dd>pneumofed {{ version }}</dd>
</dl>
{% if command %}<p>With <code>config.yaml</code> from the run folder:</p><pre class="wrap">{{ command }}</pre>{% endif %}
{% if config %}<details><summary>The experiment (config.yaml)</summary><pre>{{ config }}</pre></details>{% endif %}
{% if simulation %}<details><summary>The virtual hospitals (simulation.yaml)</summary><pre>{{ simulation }}</pre></details>{% endif %}
{% if environment %}<details><summary>The coordinator's environment</summary>
<dl class="facts">{% for name, value in environment %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></details>{% endif %}
</section>

<section aria-labelledby="limits">
<h2 id="limits">Limits of use</h2>
<ol class="text">{% for limit in limits %}<li>{{ limit }}</li>{% endfor %}</ol>
</section>
</main>
<footer>Written by pneumofed {{ version }} on {{ written }}.</footer>
</body>
</html>
"""
