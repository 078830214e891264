"""The report's style sheet: one column, system fonts, A4 in print."""

STYLE = """
:root {
  --ink: #1b2430; --soft: #4f5b69; --line: #d9dee4; --faint: #f4f6f8; --accent: #005a96;
  --good: #0b6b3a; --bad: #a3201d; --warn: #7a4a00;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header.top, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.5rem; }
header.top { padding-top: 2.5rem; }
main > section:first-child h2 { margin-top: 1.6rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; padding-bottom: 3rem; color: var(--soft); font-size: .875rem; }
footer::before { content: ""; display: block; border-top: 1px solid var(--line); margin-bottom: 1rem; }
h1, h2, h3 { line-height: 1.2; letter-spacing: -.012em; text-wrap: balance; }
h1 { font-size: 2.3rem; margin: .1rem 0 .7rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .8rem; padding-top: 1rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; }
p, ul.text, ol.text { max-width: 44rem; margin: 0 0 .9rem; }
ul.text, ol.text { padding-left: 1.3rem; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
.kicker { color: var(--soft); font-size: .875rem; margin: 0; }
.meta { color: var(--soft); font-size: .9rem; max-width: none; }
.meta .badge { margin-right: .7rem; }
.lead p { font-size: 1.13rem; line-height: 1.6; max-width: 47rem; }
.soft, caption, figcaption, .note { color: var(--soft); font-size: .875rem; }
.badge {
  display: inline-block; padding: .18rem .8rem; border-radius: 1rem; font-weight: 600; font-size: .9rem;
  color: #fff; background: var(--soft);
}
.badge.succeeded { background: var(--good); }
.badge.failed { background: var(--bad); }
.badge.stopped, .badge.unfinished { background: var(--warn); }
.box { border-left: 5px solid var(--line); background: var(--faint); padding: .9rem 1.2rem; margin: 1.3rem 0; }
.box > :last-child { margin-bottom: 0; }
.box.bad { border-color: var(--bad); background: #fdf3f2; }
.box.warn { border-color: #c77700; background: #fff8ea; }
.box p, .box ul { max-width: 54rem; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; margin: 1.2rem 0 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .92rem; }
nav li { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .7rem; margin: .7rem 0; padding: 0; }
.tiles.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.tiles.three .tile { background: var(--faint); border-color: transparent; }
.tile { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .9rem; margin: 0; }
.tile dt { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.65rem; font-weight: 650; line-height: 1.35; letter-spacing: -.01em; }
.tile .under { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4; min-width: 34rem; }
table.wide { width: 100%; }
caption { text-align: left; padding: 0 0 .5rem; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .42rem .8rem .42rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; font-weight: 600; }
tbody th { font-weight: 600; min-width: 7.5rem; }
th small, td small { display: block; font-weight: 400; color: var(--soft); font-size: .82rem; line-height: 1.35; }
th.n, td.n { text-align: right; white-space: nowrap; padding-left: .6rem; }
th.n small, td.n small { white-space: nowrap; }
td ul { margin: 0; padding: 0; list-style: none; }
td li { margin: 0; overflow-wrap: normal; }
td.counts li { white-space: nowrap; }
td.long { min-width: 12rem; }
th.n + th:not(.n), td.n + td:not(.n) { padding-left: 1.1rem; }
table.dense { font-size: .85rem; }
table.dense th, table.dense td { padding-right: .3rem; }
table.dense thead th { white-space: normal; }
table.dense tbody th { min-width: 0; }
table.dense .name { white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6rem 1.8rem; margin: 1.2rem 0; }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: .3rem; }
.pictures > figure:only-child { max-width: 36rem; grid-column: 1 / -1; }
details { margin: 1rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .55rem .9rem; }
summary { cursor: pointer; font-weight: 600; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
pre {
  overflow-x: auto; background: var(--faint); padding: .8rem 1rem; border-radius: .3rem; font-size: .82rem; line-height: 1.45;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .9em; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; font-size: .92rem; margin: 0 0 1rem; }
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  main, header.top, footer { padding-left: 1rem; padding-right: 1rem; }
  header.top { padding-top: 1.4rem; }
  h1 { font-size: 1.75rem; }
  .lead p { font-size: 1.05rem; }
  .pictures { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .tiles.three .tile:first-child { grid-column: 1 / -1; }
  .tiles.three { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  table.results { min-width: 0; }
  table.results th.n small { white-space: normal; }
  .tile { padding: .55rem .7rem; }
  .tile .value { font-size: 1.35rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .5rem; }
}
@page { size: A4; margin: 16mm 14mm; }
@media print {
  body { font-size: 10pt; line-height: 1.42; }
  main, header.top, footer { max-width: none; padding: 0; }
  nav { display: none; }
  h1 { font-size: 20pt; }
  h2 { font-size: 14pt; margin-top: 1.6rem; break-after: avoid; }
  h3 { break-after: avoid; }
  p, ul.text, ol.text { max-width: none; }
  .lead p { font-size: 11pt; max-width: none; }
  .tile .value { font-size: 14pt; }
  .tile, .box, tr, figure { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8.5pt; min-width: 0; }
  thead { display: table-header-group; }
  .badge, .box, .tile { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  pre { white-space: pre-wrap; }
  a { color: inherit; text-decoration: none; }
}
"""
