// The layers of a traced scope as nodes (boxes, borders and lanes of long edges) with edges between adjacent layers.

/** @import { Flow } from "./data.js" */

/** @typedef {{box: number, lane: boolean, row: number, above: number[], below: number[]}} Node */

/**
 * @typedef {object} Layers
 * @property {Node[]} nodes
 * @property {number[][]} rows numbers of nodes, from left to right
 * @property {number[][]} chains every edge as numbers of nodes, from box to box
 * @property {number[]} over for every node the one above that it is drawn in line with, or -1
 */

/** @type {Map<Flow, Layers>} */
const built = new Map();

/**
 * The layers of a flow, computed once.
 * @param {Flow} flow
 * @returns {Layers}
 */
export function layersOf(flow) {
  let layers = built.get(flow);
  if (!layers) {
    layers = build(flow);
    built.set(flow, layers);
  }
  return layers;
}

/**
 * @param {Flow} flow
 * @returns {Layers}
 */
function build(flow) {
  /** @type {Node[]} */
  const nodes = [];
  /** @type {Map<number, number>} */
  const boxes = new Map();
  /** @type {Map<string, number>} */
  const lanes = new Map();
  const rows = flow.rows.map((codes, row) =>
    codes.map((code) => {
      const box = (code >> 1) - 2;
      const lane = code % 2 === 1;
      if (lane) lanes.set(`${box},${row}`, nodes.length);
      else boxes.set(box, nodes.length);
      return nodes.push({ box, lane, row, above: [], below: [] }) - 1;
    }),
  );
  const at = (/** @type {number | undefined} */ node) => /** @type {number} */ (node);
  const chains = linksOf(flow).map(([source, target]) => {
    const chain = [at(boxes.get(source))];
    const last = at(boxes.get(target));
    for (let row = nodes[at(chain[0])].row + 1; row < nodes[last].row; row++) {
      chain.push(at(lanes.get(`${source},${row}`)));
    }
    return [...chain, last];
  });
  for (const chain of chains) {
    for (let step = 1; step < chain.length; step++) {
      const [upper, lower] = [chain[step - 1], chain[step]];
      if (nodes[lower].above.includes(upper)) continue;
      nodes[lower].above.push(upper);
      nodes[upper].below.push(lower);
    }
  }
  return { nodes, rows, chains, over: aligned(nodes, rows) };
}

/**
 * @param {Flow} flow
 * @returns {[number, number][]}
 */
function linksOf(flow) {
  /** @type {[number, number][]} */
  const links = flow.inputs.map((box) => [-1, box]);
  for (let end = 0; end < flow.edges.length; end += 2) links.push([flow.edges[end], flow.edges[end + 1]]);
  return [...links, .../** @type {[number, number][]} */ (flow.outputs.map((box) => [box, -2]))];
}

/**
 * Node -> the node above that it is aligned with: boxes with boxes first, then lanes with lanes, the longest
 * paths first; no two of the edges chosen cross or meet.
 * @param {Node[]} nodes
 * @param {number[][]} rows
 */
function aligned(nodes, rows) {
  const above = nodes.map(() => 0);
  const below = nodes.map(() => 0);
  for (const node of rows.flat()) above[node] = Math.max(0, ...nodes[node].above.map((upper) => above[upper] + 1));
  for (const node of rows.flat().reverse()) {
    below[node] = Math.max(0, ...nodes[node].below.map((lower) => below[lower] + 1));
  }
  const place = nodes.map(() => 0);
  for (const row of rows) {
    row.forEach((node, index) => {
      place[node] = index;
    });
  }
  const over = nodes.map(() => -1);
  for (const row of rows) {
    const edges = row.flatMap((node) => nodes[node].above.map((upper) => ({ upper, node })));
    const kind = edges.map(({ upper, node }) => kindOf(nodes[upper], nodes[node]));
    const order = edges.map((_, index) => index);
    order.sort((a, b) => {
      const [one, other] = [edges[a], edges[b]];
      return (
        kind[a] - kind[b] ||
        above[other.upper] + below[other.node] - above[one.upper] - below[one.node] ||
        place[one.node] - place[other.node] ||
        place[one.upper] - place[other.upper]
      );
    });
    /** @type {[number, number][]} */
    const chosen = [];
    for (const { upper, node } of order.map((index) => edges[index])) {
      if (chosen.every(([x, y]) => (place[upper] - x) * (place[node] - y) > 0)) {
        chosen.push([place[upper], place[node]]);
        over[node] = upper;
      }
    }
  }
  return over;
}

/**
 * @param {Node} upper
 * @param {Node} lower
 */
function kindOf(upper, lower) {
  if (upper.lane !== lower.lane) return 2;
  return upper.lane ? 1 : 0;
}
