// The layout of one scope: positions of boxes and routes of edges, from the layers computed by Python and the current
// sizes of boxes.

/** @import { Layers } from "./data.js" */
/** @import { Size } from "./coordinates.js" */
import { BORDER_SIZE, columns, GAP_X, LANE_SIZE } from "./coordinates.js";

const GAP_Y = 24;
const UNEVEN = 3.5; // boxes whose heights differ by a larger factor do not share a row

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

/**
 * Boxes without edges in rows of width `limit`, in order.
 * @param {Size[]} sizes
 * @param {number} limit
 * @returns {Arrangement}
 */
export function inRows(sizes, limit) {
  /** @type {{x: number, y: number}[]} */
  const corners = [];
  let [x, y, row, width] = [0, 0, 0, 0];
  for (const size of sizes) {
    const uneven = Math.max(size.height, row) > UNEVEN * Math.min(size.height, row);
    if (x && (x + size.width > limit || uneven)) [x, y, row] = [0, y + row + GAP_X, 0];
    corners.push({ x, y });
    x += size.width + GAP_X;
    row = Math.max(row, size.height);
    width = Math.max(width, x - GAP_X);
  }
  return { width, height: y + row, corners, routes: [], enter: width / 2, leave: width / 2 };
}

/**
 * Boxes in layers, so that every edge points down.
 * @param {Size[]} sizes
 * @param {Layers} layers
 * @returns {Arrangement}
 */
export function layered(sizes, layers) {
  const nodeSizes = layers.nodes.map(({ box, lane }) => (lane ? LANE_SIZE : box < 0 ? BORDER_SIZE : sizes[box]));
  const raw = columns(layers, nodeSizes);
  let [left, right] = [Infinity, -Infinity];
  raw.forEach((middle, node) => {
    left = Math.min(left, middle - nodeSizes[node].width / 2);
    right = Math.max(right, middle + nodeSizes[node].width / 2);
  });
  const x = raw.map((middle) => middle - left);
  const { tops, bottoms } = heights(layers, nodeSizes);
  const top = layers.nodes.map(({ row }, node) => (tops[row] + bottoms[row] - nodeSizes[node].height) / 2);
  const corners = sizes.map(() => ({ x: 0, y: 0 }));
  let [enter, leave] = [(right - left) / 2, (right - left) / 2];
  layers.nodes.forEach(({ box, lane }, node) => {
    if (lane) return;
    if (box === -1) enter = x[node];
    else if (box === -2) leave = x[node];
    else corners[box] = { x: x[node] - nodeSizes[node].width / 2, y: top[node] };
  });
  const routes = routed(layers, nodeSizes, { x, top, tops, bottoms });
  return { width: right - left, height: bottoms[bottoms.length - 1] ?? 0, corners, routes, enter, leave };
}

/**
 * @param {Layers} layers
 * @param {Size[]} sizes
 */
function heights(layers, sizes) {
  /** @type {number[]} */
  const tops = [];
  /** @type {number[]} */
  const bottoms = [];
  let y = 0;
  for (const row of layers.rows) {
    let height = 0;
    for (const node of row) height = Math.max(height, sizes[node].height);
    tops.push(y);
    bottoms.push(y + height);
    y += height + GAP_Y;
  }
  return { tops, bottoms };
}

/** @typedef {{x: number[], top: number[], tops: number[], bottoms: number[]}} Places */

/**
 * @param {Layers} layers
 * @param {Size[]} sizes
 * @param {Places} places
 * @returns {Route[]}
 */
function routed(layers, sizes, { x, top, tops, bottoms }) {
  const ends = endsOf(layers, sizes, x);
  return layers.chains.map((chain, link) => {
    const source = chain[0];
    const target = chain[chain.length - 1];
    const row = layers.nodes[source].row;
    const pieces = [[x[source] + sizes[source].leave, top[source] + sizes[source].height, bottoms[row]]];
    for (const lane of chain.slice(1, -1)) {
      pieces.push([x[lane], tops[layers.nodes[lane].row], bottoms[layers.nodes[lane].row]]);
    }
    pieces.push([ends[link], tops[layers.nodes[target].row], top[target]]);
    return {
      source: layers.nodes[source].box,
      target: layers.nodes[target].box,
      path: pathOf(pieces),
      x: ends[link],
      y: top[target],
    };
  });
}

/**
 * x at which each edge enters: the straightest one at the entry itself, the others on the side they come from.
 * @param {Layers} layers
 * @param {Size[]} sizes
 * @param {number[]} x
 */
function endsOf(layers, sizes, x) {
  /** @type {Map<number, number[]>} */
  const arriving = new Map();
  layers.chains.forEach((chain, link) => {
    const target = chain[chain.length - 1];
    arriving.set(target, [...(arriving.get(target) ?? []), link]);
  });
  /** @type {number[]} */
  const ends = [];
  for (const [target, links] of arriving) {
    const entry = x[target] + sizes[target].enter;
    const coming = links.map((link) => {
      const last = layers.chains[link][layers.chains[link].length - 2];
      return { link, side: x[last] + sizes[last].leave - entry };
    });
    coming.sort((a, b) => Math.abs(a.side) - Math.abs(b.side) || a.link - b.link);
    ends[coming[0].link] = entry;
    const room = Math.max(sizes[target].width / 2 - Math.abs(sizes[target].enter) - 10, 0);
    for (const sign of [-1, 1]) {
      const others = coming.slice(1).filter(({ side }) => side > 0 === sign > 0);
      const step = Math.min(16, room / Math.max(others.length, 1));
      others.forEach(({ link }, place) => {
        ends[link] = entry + sign * step * (place + 1);
      });
    }
  }
  return ends;
}

/**
 * Vertical beside boxes, curved in the gaps between layers.
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
