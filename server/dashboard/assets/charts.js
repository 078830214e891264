// A line chart as inline SVG, drawn from numbers. Lines differ in colour, dashes and marks, so that the chart can be read without colours.

const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 560, height: 300, left: 46, right: 14, top: 34, bottom: 38 };
const MARKS = [circle, square, diamond, triangle, point, cross];
const LEGEND_ROW = 16;

/** Draws `series` ([{name, style, points: [[x, y], ...]}]), `style` from 0 on, into `place`; `options` are {label, from, to, rounds, waiting}. */
export function drawChart(place, series, options) {
  const shown = series.filter((one) => one.points.length > 0);
  const places = placeLegend(shown);
  const top = BOX.top + LEGEND_ROW * (places.at(-1)?.row ?? 0);
  const svg = make("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": describe(shown, options) });
  const values = shown.flatMap((one) => one.points.map((point) => point[1]));
  const [low, high, step] = scale(values, options);
  const last = Math.max(options.rounds, 2, ...shown.flatMap((one) => one.points.map((point) => point[0])));
  const x = (round) => BOX.left + 8 + ((round - 1) / (last - 1)) * (BOX.width - BOX.left - BOX.right - 16);
  const y = (value) => BOX.height - BOX.bottom - ((value - low) / (high - low)) * (BOX.height - top - BOX.bottom);
  drawAxes(svg, { low, high, step, last, x, y });
  shown.forEach((one) => drawLine(svg, one, x, y));
  shown.forEach((one, index) => drawKey(svg, one, places[index]));
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
  svg.append(make("path", { d: path, class: `line ${look(one.style)}` }));
  if (one.points.length > 40) return;
  for (const [round, value] of one.points) {
    const mark = drawMark(one.style, x(round), y(value));
    mark.append(make("title", {}, `${one.name}, round ${round}: ${value.toFixed(3)}`));
    svg.append(mark);
  }
}

/** Where each line stands in the legend: rows that are as wide as the chart. */
function placeLegend(shown) {
  let [left, row] = [BOX.left, 0];
  return shown.map((one) => {
    const width = 33 + one.name.length * 7;
    if (left > BOX.left && left + width > BOX.width) [left, row] = [BOX.left, row + 1];
    const place = { left, row };
    left += width + 20;
    return place;
  });
}

function drawKey(svg, one, place) {
  const middle = 13 + LEGEND_ROW * place.row;
  svg.append(make("path", { d: `M${place.left} ${middle}h26`, class: `line ${look(one.style)}` }), drawMark(one.style, place.left + 13, middle));
  svg.append(make("text", { x: place.left + 33, y: middle + 4, class: "legend" }, one.name));
}

/** Colours come again after six, and then with the dashes and marks of another. */
function shape(style) {
  return (style + Math.floor(style / MARKS.length)) % MARKS.length;
}

function look(style) {
  return `c${style % MARKS.length} d${shape(style)}`;
}

function drawMark(style, x, y) {
  const mark = MARKS[shape(style)](x, y);
  mark.setAttribute("class", `mark c${style % MARKS.length}`);
  return mark;
}

function circle(x, y) {
  return make("circle", { cx: x, cy: y, r: 3.2 });
}

function square(x, y) {
  return make("rect", { x: x - 3, y: y - 3, width: 6, height: 6 });
}

function diamond(x, y) {
  return make("path", { d: `M${x} ${y - 4.2}l4.2 4.2l-4.2 4.2l-4.2 -4.2z` });
}

function triangle(x, y) {
  return make("path", { d: `M${x} ${y - 4}l4 7h-8z` });
}

function point(x, y) {
  return make("path", { d: `M${x} ${y + 4}l4 -7h-8z` });
}

function cross(x, y) {
  return make("path", { d: `M${x - 3.5} ${y - 3.5}l7 7m0 -7l-7 7` });
}

function make(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
