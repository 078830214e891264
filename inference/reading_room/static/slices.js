// The slices of a CT series as they are wanted: the one that is looked at first, then its neighbours on the way of the reader. A few
// requests at a time, and a bounded part of the series in memory, however long it is.

import { ask, askBytes } from "./api.js";

const AT_ONCE = 3;
const AHEAD = 6;
const BEHIND = 2;
const HELD_BYTES = 64 * 2 ** 20;
const HELD_MAPS = 400;

/** The series of `case_`, a CaseDetail. `arrived(number)` is called when a slice that was wanted is here. */
export class Slices {
  constructor(case_, signal, arrived) {
    const { series } = case_.image.facts;
    Object.assign(this, { series, id: case_.id, count: series.slices, signal, arrived, problem: null });
    this.most = Math.max(AHEAD + BEHIND + 2, Math.floor(HELD_BYTES / (2 * case_.image.width * case_.image.height)));
    this.held = new Map();
    this.maps = new Map();
    this.asked = new Map();
    this.wanted = [];
  }

  /** The slice in the middle, where a reader begins. */
  get middle() {
    return Math.floor((this.count + 1) / 2);
  }

  /** A number that there is. */
  clamp(number) {
    return Math.min(this.count, Math.max(1, Math.round(number)));
  }

  /** Where a slice lies along the body in mm: in the scanner's coordinates, or from slice 1 where nobody states them. */
  position(number) {
    return (this.series.first_mm ?? 0) + (number - 1) * this.series.spacing_mm;
  }

  /** The pixels of a slice, {values, width, height}, or undefined while they are not here. */
  take(number) {
    const found = this.held.get(number);
    if (found) {
      this.held.delete(number);
      this.held.set(number, found); // the last one of all to be given up
    }
    return found;
  }

  /** Asks for a slice, and for those that the reader, who moves by `step`, will want next. What nobody waits for any more is given up. */
  want(number, step = 1) {
    const way = Math.sign(step) || 1;
    const places = [number];
    for (let i = 1; i <= AHEAD; i++) {
      places.push(number + way * i);
      if (i <= BEHIND) places.push(number - way * i);
    }
    this.wanted = places.filter((one) => one >= 1 && one <= this.count);
    for (const [place, request] of this.asked) if (!this.wanted.includes(place)) request.abort();
    this.next();
  }

  next() {
    for (const place of this.wanted) {
      if (this.asked.size >= AT_ONCE) return;
      if (!this.held.has(place) && !this.asked.has(place)) this.load(place);
    }
  }

  async load(number) {
    const request = new AbortController();
    const give = () => request.abort();
    this.signal.addEventListener("abort", give);
    this.asked.set(number, request);
    try {
      const { bytes, headers } = await askBytes(`/api/cases/${this.id}/pixels?slice=${number}`, request.signal);
      const [width, height] = ["X-Image-Width", "X-Image-Height"].map((name) => Number(headers.get(name)));
      this.held.set(number, { values: new Uint16Array(bytes), width, height });
      for (const old of this.held.keys()) if (this.held.size > this.most) this.held.delete(old);
      this.problem = null;
    } catch (problem) {
      if (problem.name !== "AbortError") {
        this.problem = problem;
        this.wanted = []; // until the reader moves on, or the server is back
      }
    }
    this.signal.removeEventListener("abort", give);
    this.asked.delete(number);
    if (this.signal.aborted) return;
    if (this.held.has(number) || this.problem) this.arrived(number);
    this.next();
  }

  /** The map of evidence at a slice, a HeatMap. @throws {Problem} */
  map(number) {
    if (!this.maps.has(number)) {
      if (this.maps.size >= HELD_MAPS) this.maps.clear();
      const asked = ask(`/api/cases/${this.id}/map?slice=${number}`, { signal: this.signal });
      asked.catch(() => this.maps.delete(number));
      this.maps.set(number, asked);
    }
    return this.maps.get(number);
  }
}
