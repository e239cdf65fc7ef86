// The data from Python (hra_fx/view/html/rendering.py) as objects.

/**
 * A box: a leaf, or a scope with the boxes inside it.
 * @typedef {object} Item
 * @property {number} index index among all boxes; a box comes before the boxes inside it
 * @property {Item | null} parent the scope around it
 * @property {Item[]} parts the boxes inside, in order
 * @property {boolean} isScope
 * @property {string} label name inside its scope
 * @property {string} kind "traced" or "untraced" for a scope; else "input", "output", "adapted_layer", "module", "op" or
 *   "eager"
 * @property {string} detail class and shape, or what an operation reads
 * @property {string} op the fx opcode
 * @property {string} target qualified name of the module, or name of the function
 * @property {string[]} [ports] where the values come from that a scope reads
 * @property {string} shape shape of its value
 * @property {string} dtype dtype of its value
 * @property {string[]} marks the adapted layers that it stands for
 * @property {string[]} paths the modules that it stands for
 * @property {number} rank number of reflection vectors
 * @property {number} parameters number of parameters of the modules
 * @property {number} count number of identical neighbors that it stands for
 * @property {string[]} skipped layers without an adapter in it
 * @property {string[]} trained layers in it that are trained in full
 */

/** A row of `hra_fx.report`.
 * @typedef {{path: string, adapter: string, active: boolean, d: number, r: number, parameters: number,
 *   rotation: number, angle: number, orthogonality: number, mean_angle: number, angles: number[], share: number,
 *   weight_change: number}} Row */

/** @typedef {{words: string, unit: string, ends: [number, number], values: Map<string, number>}} Heat */
/** @typedef {{path: string, reason: string, refused: boolean, item: Item}} SkippedLayer */

/**
 * @typedef {object} Drawing
 * @property {string} title
 * @property {string} facts
 * @property {Item[]} items
 * @property {Map<string, Row[]>} rows by layer; several adapters are several rows
 * @property {Map<string, Heat>} heats by name
 * @property {string} heat the heatmap that is shown at first, or "" for none
 * @property {[string, string][]} colors from the low to the high end of a heatmap, and then for an unknown value: fill,
 *   and color of text on it
 * @property {SkippedLayer[]} skipped
 */

/**
 * @param {any[]} records
 * @returns {Item[]}
 */
function itemsOf(records) {
  /** @type {Item[]} */
  const items = [];
  records.forEach(({ parent, ...record }, index) => {
    const lists = { parts: [], skipped: [], trained: [] };
    const item = { marks: [], ...record, ...lists, index };
    item.isScope = item.kind === "traced" || item.kind === "untraced";
    item.parent = index ? items[parent] : null;
    item.parent?.parts.push(item);
    items.push(item);
  });
  return items;
}

/**
 * @param {any[]} rows
 * @returns {Map<string, Row[]>}
 */
function rowsOf(rows) {
  /** @type {Map<string, Row[]>} */
  const byPath = new Map();
  for (const row of rows) byPath.set(row.path, [...(byPath.get(row.path) ?? []), row]);
  return byPath;
}

/**
 * @param {string} json
 * @returns {Drawing}
 */
export function read(json) {
  const data = JSON.parse(json, (_, value) => value ?? NaN); // JSON has no NaN, only null
  const items = itemsOf(data.items);
  /** @type {Map<string, Heat>} */
  const heats = new Map();
  for (const [name, heat] of Object.entries(data.heats)) heats.set(name, { ...heat, values: new Map(heat.values) });
  /** @type {SkippedLayer[]} */
  const skipped = data.skipped.map((/** @type {any} */ layer) => ({ ...layer, item: items[layer.item] }));
  for (const { path, item } of skipped) item.skipped.push(path);
  for (const { path, item } of data.full) items[item].trained.push(path);
  return { ...data, items, rows: rowsOf(data.rows), heats, skipped };
}

/**
 * The adapted layers in a box, in order.
 * @param {Item} item
 * @returns {string[]}
 */
export function marksOf(item) {
  return item.isScope ? item.parts.flatMap(marksOf) : item.marks;
}

/**
 * The layers in a box that could have an adapter but do not.
 * @param {Item} item
 * @returns {string[]}
 */
export function skippedIn(item) {
  return [...item.skipped, ...item.parts.flatMap(skippedIn)];
}
