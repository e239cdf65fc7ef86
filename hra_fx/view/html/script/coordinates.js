// x coordinates of the boxes of a layered scope, as in hra_fx/view/coordinates.py.

/** @import { Layers } from "./data.js" */

/** A box to place, and where edges enter (top) and leave (bottom), relative to its middle.
 * @typedef {{width: number, height: number, enter: number, leave: number}} Size */

export const GAP_X = 22;
const LANE = 14;
const SWEEPS = 16;

/** @typedef {{other: number, gap: number}} Side */

/**
 * x of the middle of every node, by its number.
 * @param {Layers} layers
 * @param {Size[]} sizes of the nodes
 * @returns {number[]}
 */
export function columns(layers, sizes) {
  const { line, shift, count } = linesOf(layers, sizes);
  const { left, right } = distances(layers, sizes, line, shift, count);
  const x = middle(left, right);
  /** @type {Side[][]} */
  const pulls = x.map(() => []);
  layers.nodes.forEach((node, upper) => {
    for (const lower of node.below) {
      const [a, b] = [line[upper], line[lower]];
      if (a === b) continue;
      const bend = shift[upper] + sizes[upper].leave - shift[lower] - sizes[lower].enter;
      pulls[a].push({ other: b, gap: -bend });
      pulls[b].push({ other: a, gap: bend });
    }
  });
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    for (let step = 0; step < count; step++) {
      const number = sweep % 2 ? count - 1 - step : step;
      const pull = pulls[number];
      if (!pull.length) continue;
      let wanted = 0;
      for (const { other, gap } of pull) wanted += x[other] + gap;
      let low = -Infinity;
      let high = Infinity;
      for (const { other, gap } of left[number]) low = Math.max(low, x[other] + gap);
      for (const { other, gap } of right[number]) high = Math.min(high, x[other] - gap);
      x[number] = Math.max(low, Math.min(wanted / pull.length, high));
    }
  }
  return layers.nodes.map((_, node) => x[line[node]] + shift[node]);
}

/**
 * Lines of aligned nodes: for each node the number of its line, and the offset of its middle.
 * @param {Layers} layers
 * @param {Size[]} sizes
 */
function linesOf(layers, sizes) {
  /** @type {number[]} */
  const line = [];
  /** @type {number[]} */
  const shift = [];
  let count = 0;
  for (const node of layers.rows.flat()) {
    const upper = layers.nodes[node].over;
    line[node] = upper < 0 ? count++ : line[upper];
    shift[node] = upper < 0 ? 0 : shift[upper] + sizes[upper].leave - sizes[node].enter;
  }
  return { line, shift, count };
}

/**
 * The minimum distances of lines, from nodes that are side by side: for each line those on its left and right.
 * @param {Layers} layers
 * @param {Size[]} sizes
 * @param {number[]} line
 * @param {number[]} shift
 * @param {number} count
 */
function distances(layers, sizes, line, shift, count) {
  /** @type {Side[][]} */
  const left = Array.from({ length: count }, () => []);
  /** @type {Side[][]} */
  const right = Array.from({ length: count }, () => []);
  for (const row of layers.rows) {
    for (let step = 1; step < row.length; step++) {
      const [one, next] = [row[step - 1], row[step]];
      const space = layers.nodes[one].lane || layers.nodes[next].lane ? GAP_X / 2 : GAP_X;
      const gap = (sizes[one].width + sizes[next].width) / 2 + space + shift[one] - shift[next];
      left[line[next]].push({ other: line[one], gap });
      right[line[one]].push({ other: line[next], gap });
    }
  }
  return { left, right };
}

/**
 * Midway between the leftmost and rightmost positions. Both keep the distances, so their mean does too.
 * @param {Side[][]} left
 * @param {Side[][]} right
 */
function middle(left, right) {
  const order = left.map((sides, number) => (sides.length ? -1 : number)).filter((number) => number >= 0);
  const waiting = left.map((sides) => sides.length);
  for (let step = 0; step < order.length; step++) {
    for (const { other } of right[order[step]]) if (--waiting[other] === 0) order.push(other);
  }
  const leftmost = left.map(() => 0);
  let most = 0;
  for (const number of order) {
    for (const { other, gap } of left[number]) leftmost[number] = Math.max(leftmost[number], leftmost[other] + gap);
    most = Math.max(most, leftmost[number]);
  }
  const rightmost = left.map(() => most);
  for (const number of order.reverse()) {
    for (const { other, gap } of right[number]) rightmost[number] = Math.min(rightmost[number], rightmost[other] - gap);
  }
  return leftmost.map((value, number) => (value + rightmost[number]) / 2);
}

/** @type {Size} */
export const LANE_SIZE = { width: LANE, height: 0, enter: 0, leave: 0 };
/** @type {Size} */
export const BORDER_SIZE = { width: 0, height: 0, enter: 0, leave: 0 };
