"""The monitor's page as a Jinja2 template; a Python string, since a Flower app's bundle takes no HTML files."""

PAGE = """\
{%- macro quantities(rows) -%}
<div class="scroll" role="region" aria-label="Quantities" tabindex="0">
<table class="wide dense">
<thead><tr><th scope="col">Quantity</th><th scope="col">State</th><th scope="col" class="n">p-value</th>
<th scope="col">What it means</th><th scope="col">Since about</th><th scope="col" class="n">Median now</th>
<th scope="col" class="n">Usually</th><th scope="col" class="n">Patients</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row.title }}</th>
<td>{% if row.alarm %}<strong>alarm</strong><small>{{ row.alarm_day.strftime('%d %b %Y') }}</small>{% else %}quiet{% endif %}</td>
<td class="n">{{ row.p_value | p }}</td><td class="long">{{ row.meaning or '–' }}</td>
<td class="name">{{ row.since.strftime('%d %b %Y') if row.meaning else '–' }}</td>
<td class="n">{{ '–' if row.now is none else '%.3g' % row.now }}</td>
<td class="n">{{ '–' if row.usual is none else '%.3g' % row.usual }}</td><td class="n">{{ '{:,}'.format(row.images) }}</td></tr>
{% endfor %}
</tbody></table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Drift monitor – pneumofed</title>
<style>{{ style }}</style>
</head>
<body>
<header class="top">
<p class="kicker">pneumofed: are the images still like those that the model was made for?</p>
<h1>Drift monitor</h1>
<p class="meta"><span class="badge {{ 'failed' if alarm else 'succeeded' }}">{{ 'Alarm' if alarm else 'Quiet' }}</span>
Written on {{ written }}; model {{ reference.digest[:12] }}</p>
</header>
<main>
<section aria-labelledby="summary">
<h2 id="summary">Summary</h2>
<div class="lead">{% for sentence in sentences %}<p>{{ sentence }}</p>{% endfor %}</div>
{% if alarm %}
<div class="box warn"><p><strong>What to do.</strong> Look at some of the images and ask what was changed: a device, its
processing, the patients who are sent. Until that is known, do not rely on the model for this scanner. If a fault was mended,
<code>pneumofed monitor resume</code> begins anew. If the change is in order, and the model was checked on images of it,
<code>pneumofed monitor accept</code> takes the new images as what to compare with.</p></div>
{% endif %}
</section>
{% if pictures[0] %}
<section aria-labelledby="evidence">
<h2 id="evidence">Evidence over time</h2>
<figure><img src="{{ pictures[0] }}" width="1200" height="900" alt="p-value of each quantity over days, by scanner"
style="max-width: 46rem">
<figcaption>The smallest p-value so far, adjusted for everything that is watched; higher is clearer. Above the red line is an alarm. The
chance of any false one within a year is at most {{ '%g' % (100 * rate) }}%, for the whole site and however often one
looks.</figcaption></figure>
</section>
{% endif %}
{% for scanner in scanners %}
<section aria-labelledby="scanner-{{ loop.index }}">
<h2 id="scanner-{{ loop.index }}">{{ scanner.name }}</h2>
<p>{{ '{:,}'.format(scanner.images) }} images of {{ '{:,}'.format(scanner.patients) }} patients, compared with
{{ 'its own baseline' if scanner.own_baseline else "the model's reference images" }}.
{% if scanner.prevalence %}If only the share of pneumonia has changed, it is now {{ '%.0f' % (100 * scanner.prevalence.value) }}% (95%
CI {{ '%.0f' % (100 * scanner.prevalence.low) }}–{{ '%.0f' % (100 * scanner.prevalence.high) }}%; last 200 patients) against
{{ '%.0f' % (100 * reference.separation.prevalence) }}% in the reference.{% endif %}</p>
{% if scanner.told %}{{ quantities(scanner.told) }}{% endif %}
{% if scanner.untold %}
<details><summary>{{ scanner.untold | length }} quantities without evidence</summary>{{ quantities(scanner.untold) }}</details>
{% endif %}
</section>
{% endfor %}
{% if looks %}
<section aria-labelledby="days">
<h2 id="days">Single days</h2>
{% if pictures[1] %}
<figure><img src="{{ pictures[1] }}" width="1200" height="900" alt="p-values by day and quantity" style="max-width: 46rem">
<figcaption>Each day of the last {{ back_days }} by itself, adjusted for the quantities of that day and scanner (Holm 1979). On about
one quiet day in twenty something passes 0.05: no alarm rests on a single day.</figcaption></figure>
{% endif %}
<div class="scroll" role="region" aria-label="Days" tabindex="0">
<table class="wide dense">
<caption>The latest days. PSI: stability index of the probabilities, which without any change is about 9 / patients.</caption>
<thead><tr><th scope="col">Day</th><th scope="col">Scanner</th><th scope="col" class="n">Images</th>
<th scope="col" class="n">Patients judged</th><th scope="col" class="n">Not judged</th><th scope="col" class="n">Smallest p-value</th>
<th scope="col" class="n">PSI</th><th scope="col" class="n">Pneumonia, if only its share changed</th>
<th scope="col" class="n">Changed by readers<small>of read, expected</small></th></tr></thead>
<tbody>
{% for seen in looks %}
<tr><th scope="row" class="name">{{ seen.day | day }}</th><td>{{ seen.scanner }}</td><td class="n">{{ seen.images }}</td>
<td class="n">{{ seen.patients }}</td><td class="n">{{ seen.refused }}</td>
<td class="n">{{ (seen.p_values.values() | min | p) if seen.p_values else '–' }}</td>
<td class="n">{{ '–' if seen.stability_index is none else '%.2f' % seen.stability_index }}</td>
<td class="n">{% if seen.prevalence %}{{ '%.0f' % (100 * seen.prevalence.value) }}%
<small>{{ '%.0f' % (100 * seen.prevalence.low) }}–{{ '%.0f' % (100 * seen.prevalence.high) }}%</small>{% else %}–{% endif %}</td>
<td class="n">{% if seen.read %}{{ seen.corrected }}<small>of {{ seen.read }}, {{ '%.1f' % seen.expected_corrections }}</small>
{%- else %}–{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
{% endif %}
<section aria-labelledby="limits">
<h2 id="limits">What the promise rests on</h2>
<ul class="text">
<li>Nothing changed means: an arriving patient could as well have been one of the reference. A hospital that always differed from it
alarms in its first days; that is true and no fault of the test. Check the model on its images, then accept them as baseline.</li>
<li>Each patient counts once, with the first image; where patients are unknown each image counts as one.</li>
<li>For corrections it means that verdicts are wrong as often as the calibrated probability says (and a chance of error below 2% is
never held against the model); for refusals that at most 5% of the patients' images cannot be judged.</li>
<li>Quiet does not mean that the model is right: a drift that moves none of these quantities is not seen, and a small one needs many
images.</li>
</ul>
</section>
</main>
<footer><p>This is research software and no medical device.</p></footer>
</body>
</html>
"""
