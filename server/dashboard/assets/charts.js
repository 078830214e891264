// A line chart as inline SVG, drawn from numbers. Lines differ in colour, dashes and marks, so that the chart can be read without colours.

const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 560, height: 300, left: 46, right: 14, top: 34, bottom: 38 };
const MARKS = [circle, square, diamond, triangle];

/** Draws `series` ([{name, style, points: [[x, y], ...]}]), `style` from 0 to 3, into `place`; `options` are {label, from, to, rounds, waiting}. */
export function drawChart(place, series, options) {
  const shown = series.filter((one) => one.points.length > 0);
  const svg = make("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": describe(shown, options) });
  const values = shown.flatMap((one) => one.points.map((point) => point[1]));
  const [low, high, step] = scale(values, options);
  const last = Math.max(options.rounds, 2, ...shown.flatMap((one) => one.points.map((point) => point[0])));
  const x = (round) => BOX.left + 8 + ((round - 1) / (last - 1)) * (BOX.width - BOX.left - BOX.right - 16);
  const y = (value) => BOX.height - BOX.bottom - ((value - low) / (high - low)) * (BOX.height - BOX.top - BOX.bottom);
  drawAxes(svg, { low, high, step, last, x, y });
  shown.forEach((one) => drawLine(svg, one, x, y));
  drawLegend(svg, shown);
  if (!shown.length) svg.append(make("text", { x: BOX.width / 2, y: 160, class: "waiting" }, options.waiting));
  place.replaceChildren(svg);
}

function describe(shown, options) {
  if (!shown.length) return `${options.label}: ${options.waiting}`;
  const parts = shown.map((one) => {
    const [round, value] = one.points.at(-1);
    return `${one.name} ${value.toFixed(3)} in round ${round}`;
  });
  return `${options.label}. Latest: ${parts.join(", ")}. The table below holds all numbers.`;
}

/** Lowest and highest value of the axis and the distance of its lines, all round numbers. */
function scale(values, options) {
  let low = Math.min(options.from, ...values);
  let high = Math.max(options.to ?? -Infinity, ...values);
  if (!Number.isFinite(high) || high <= low) high = low + 1;
  const raw = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
  low = Math.floor(low / step + 1e-9) * step;
  high = Math.ceil(high / step - 1e-9) * step;
  return [low, high, step];
}

function drawAxes(svg, { low, high, step, last, x, y }) {
  const digits = step >= 1 ? 0 : step >= 0.1 && Math.abs(step * 10 - Math.round(step * 10)) < 1e-9 ? 1 : 2;
  for (let value = low; value <= high + step / 2; value += step) {
    svg.append(make("line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(make("text", { x: BOX.left - 7, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits)));
  }
  const base = BOX.height - BOX.bottom;
  svg.append(make("line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: base, y2: base, class: "axis" }));
  const every = Math.max(1, Math.ceil(last / 12));
  for (let round = 1; round <= last; round += every) {
    svg.append(make("text", { x: x(round), y: base + 17, "text-anchor": "middle" }, String(round)));
  }
  svg.append(make("text", { x: BOX.width - BOX.right, y: BOX.height - 4, "text-anchor": "end" }, "round"));
}

function drawLine(svg, one, x, y) {
  const path = one.points.map(([round, value], n) => `${n ? "L" : "M"}${x(round).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  svg.append(make("path", { d: path, class: `line s${one.style}` }));
  if (one.points.length > 40) return;
  for (const [round, value] of one.points) {
    const mark = MARKS[one.style](x(round), y(value));
    mark.append(make("title", {}, `${one.name}, round ${round}: ${value.toFixed(3)}`));
    svg.append(mark);
  }
}

function drawLegend(svg, shown) {
  let left = BOX.left;
  for (const one of shown) {
    svg.append(make("path", { d: `M${left} 13h26`, class: `line s${one.style}` }), MARKS[one.style](left + 13, 13));
    svg.append(make("text", { x: left + 33, y: 17, class: "legend" }, one.name));
    left += 33 + one.name.length * 7 + 20;
  }
}

function circle(x, y) {
  return make("circle", { cx: x, cy: y, r: 3.2, class: "mark s0" });
}

function square(x, y) {
  return make("rect", { x: x - 3, y: y - 3, width: 6, height: 6, class: "mark s1" });
}

function diamond(x, y) {
  return make("path", { d: `M${x} ${y - 4.2}l4.2 4.2l-4.2 4.2l-4.2 -4.2z`, class: "mark s2" });
}

function triangle(x, y) {
  return make("path", { d: `M${x} ${y - 4}l4 7h-8z`, class: "mark s3" });
}

function make(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
