// The layout of one scope: positions of boxes and routes of edges, as in hra_fx/view/layout.py.

/** @import { Flow } from "./data.js" */

/** A box to place, and where edges enter (top) and leave (bottom), relative to its middle.
 * @typedef {{width: number, height: number, enter: number, leave: number}} Size */

/** An edge: its path, and the position of its arrow; -1 and -2 are the borders.
 * @typedef {{source: number, target: number, path: string, x: number, y: number}} Route */

/**
 * @typedef {object} Arrangement
 * @property {number} width
 * @property {number} height
 * @property {{x: number, y: number}[]} corners the upper left ones
 * @property {Route[]} routes
 * @property {number} enter x of the port on top
 * @property {number} leave x of the port below
 */

const GAP_X = 22;
const GAP_Y = 24;
const LANE = 14; // distance of long edges from boxes and from each other
const BORDER = { width: 0, height: 0, enter: 0, leave: 0 };

/**
 * Boxes in the rows of their scope, so that every edge points down.
 * @param {Size[]} sizes
 * @param {Flow} flow
 * @returns {Arrangement}
 */
export function layered(sizes, flow) {
  return new Layout(sizes, flow).arrangement();
}

/** The positions of all boxes. The borders are boxes without a size in rows of their own, the first and the last. */
class Layout {
  /**
   * @param {Size[]} sizes
   * @param {Flow} flow
   */
  constructor(sizes, { rows, edges, inputs, outputs }) {
    const count = sizes.length;
    this.count = count;
    this.sizes = [...sizes, BORDER, BORDER];
    const enter = inputs.map((box) => [count, box]);
    const leave = outputs.map((box) => [box, count + 1]);
    this.links = [...enter, ...edges, ...leave];
    /** @type {number[][]} */
    this.sources = this.sizes.map(() => []);
    for (const [source, target] of this.links) this.sources[target].push(source);
    const last = Math.max(-1, ...rows) + 2;
    this.row = [...rows.map((row) => row + 1), 0, last];
    /** @type {number[][]} */
    this.rows = Array.from({ length: last + 1 }, () => []);
    this.row.forEach((row, box) => void this.rows[row].push(box));
    this.x = this.sizes.map(() => 0);
    for (const boxes of this.rows.slice(1)) this.#place(boxes);
    const entries = inputs.filter((box) => this.row[box] === 1).map((box) => this.x[box] + sizes[box].enter);
    this.x[count] = mean(entries);
    this.tops = [0];
    this.bottoms = [0];
    let y = inputs.length ? GAP_Y : 0;
    for (const boxes of this.rows.slice(1, -1)) {
      this.tops.push(y);
      this.bottoms.push(y + Math.max(0, ...boxes.map((box) => this.sizes[box].height)));
      y = this.bottoms[this.bottoms.length - 1] + GAP_Y;
    }
    const end = outputs.length ? y : this.bottoms[this.bottoms.length - 1];
    this.tops.push(end);
    this.bottoms.push(end);
    this.lanes = this.#lanesOf();
  }

  /**
   * Place a row: each box below its sources in the row above, with gaps between, and not more to one side.
   * @param {number[]} boxes
   */
  #place(boxes) {
    const { sizes, row, x } = this;
    const wanted = new Map(
      boxes.map((box) => {
        const above = this.sources[box].filter((source) => row[source] === row[box] - 1);
        return [box, mean(above.map((source) => x[source] + sizes[source].leave - sizes[box].enter))];
      }),
    );
    const want = (/** @type {number} */ box) => wanted.get(box) ?? 0;
    boxes.sort((a, b) => want(a) - want(b) || a - b);
    let free = -Infinity;
    for (const box of boxes) {
      const half = sizes[box].width / 2;
      x[box] = Math.max(want(box), free + half);
      free = x[box] + half + GAP_X;
    }
    const shift = mean(boxes.map((box) => want(box) - x[box]));
    for (const box of boxes) x[box] += shift;
  }

  /** @param {number} box */
  #right(box) {
    return this.x[box] + this.sizes[box].width / 2;
  }

  /** Source -> x of its long edges, beside the rows that they pass; short ones are nearer to the boxes. */
  #lanesOf() {
    /** @type {Map<number, [number, number]>} */
    const spans = new Map(); // the first row, and the one after the last row
    for (const [source, target] of this.links) {
      const start = this.row[source] + 1;
      const end = Math.max(this.row[target], spans.get(source)?.[1] ?? 0);
      if (end > start) spans.set(source, [start, end]);
    }
    /** @type {Map<number, number>} */
    const lanes = new Map();
    const shortest = [...spans].sort(([a, [c, d]], [b, [e, f]]) => d - c - (f - e) || a - b);
    for (const [source, [start, end]] of shortest) {
      const beside = this.rows.slice(start, end).flatMap((boxes) => boxes.map((box) => this.#right(box)));
      for (const [other, x] of lanes) {
        const [first, stop] = /** @type {[number, number]} */ (spans.get(other));
        if (first < end && start < stop) beside.push(x);
      }
      lanes.set(source, Math.max(...beside) + LANE);
    }
    return lanes;
  }

  /**
   * The upper edge of a box, which is in the middle of its row.
   * @param {number} box
   */
  #top(box) {
    const row = this.row[box];
    return (this.tops[row] + this.bottoms[row] - this.sizes[box].height) / 2;
  }

  /** @returns {Arrangement} */
  arrangement() {
    const { count, x, sizes } = this;
    const boxes = [...Array(count).keys()];
    const left = count ? Math.min(...boxes.map((box) => x[box] - sizes[box].width / 2)) : 0;
    const lanes = [...this.lanes.values()].map((lane) => lane + 1);
    const right = count ? Math.max(...boxes.map((box) => this.#right(box)), ...lanes) : 0;
    const corners = boxes.map((box) => ({ x: x[box] - sizes[box].width / 2 - left, y: this.#top(box) }));
    const ends = this.#ends();
    const routes = this.links.map(([source, target], link) => this.#route(source, target, ends[link], left));
    const height = this.bottoms[this.bottoms.length - 1];
    return { width: right - left, height, corners, routes, enter: x[count] - left, leave: x[count + 1] - left };
  }

  /**
   * @param {number} source
   * @param {number} target
   * @param {number} end
   * @param {number} left
   * @returns {Route}
   */
  #route(source, target, end, left) {
    const { count, sizes, tops, bottoms } = this;
    const [above, below] = [this.row[source], this.row[target]];
    const pieces = [[this.x[source] + sizes[source].leave, this.#top(source) + sizes[source].height, bottoms[above]]];
    if (below - above > 1) pieces.push([this.#lane(source), tops[above + 1], bottoms[below - 1]]);
    pieces.push([end, tops[below], this.#top(target)]);
    for (const piece of pieces) piece[0] -= left;
    const named = { source: source < count ? source : -1, target: target < count ? target : -2 };
    return { ...named, path: pathOf(pieces), x: end - left, y: this.#top(target) };
  }

  /** @param {number} source */
  #lane(source) {
    return /** @type {number} */ (this.lanes.get(source));
  }

  /** x at which each edge enters: the straightest one at the entry itself, the others on the side they come from. */
  #ends() {
    const { sizes, row, x } = this;
    /** @type {number[]} */
    const ends = [];
    /** @type {number[][]} */
    const arriving = sizes.map(() => []);
    this.links.forEach(([, target], link) => void arriving[target].push(link));
    arriving.forEach((links, target) => {
      const entry = x[target] + sizes[target].enter;
      const coming = links.map((link) => {
        const [source] = this.links[link];
        const isLong = row[target] - row[source] > 1;
        return { link, side: (isLong ? this.#lane(source) : x[source] + sizes[source].leave) - entry };
      });
      coming.sort((a, b) => Math.abs(a.side) - Math.abs(b.side) || a.link - b.link);
      for (const { link } of coming.slice(0, 1)) ends[link] = entry;
      const room = Math.max(sizes[target].width / 2 - Math.abs(sizes[target].enter) - 10, 0);
      for (const sign of [-1, 1]) {
        const others = coming.slice(1).filter(({ side }) => side > 0 === sign > 0);
        const step = Math.min(16, room / Math.max(others.length, 1));
        others.forEach(({ link }, place) => {
          ends[link] = entry + sign * step * (place + 1);
        });
      }
    });
    return ends;
  }
}

/** @param {number[]} values */
function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0;
}

/**
 * Vertical beside boxes, curved in the gaps between rows.
 * @param {number[][]} pieces vertical ones, as x, from y and to y
 */
function pathOf(pieces) {
  const words = [`M${short(pieces[0][0])} ${short(pieces[0][1])}V${short(pieces[0][2])}`];
  for (let step = 1; step < pieces.length; step++) {
    const [x0, , y0] = pieces[step - 1];
    const [x1, y1, y2] = pieces[step];
    const bend = short((y0 + y1) / 2);
    const there = short(x1);
    words.push(x0 === x1 ? `V${short(y1)}` : `C${short(x0)} ${bend} ${there} ${bend} ${there} ${short(y1)}`);
    words.push(`V${short(y2)}`);
  }
  return words.join("");
}

/** @param {number} value */
function short(value) {
  return String(Math.round(value * 10) / 10);
}
