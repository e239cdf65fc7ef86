// The data from Python (hra_fx/view/html/data.py) as objects.

/**
 * The edges of a traced scope as a flat list of pairs of boxes, and its layers from top to bottom. An entry of a layer
 * is 2 * (box + 2), plus 1 for a lane of an edge that leaves that box; boxes -1 and -2 are the borders.
 * @typedef {{edges: number[], inputs: number[], outputs: number[], rows: number[][]}} Flow
 */

/**
 * A box: a leaf, or a scope with the boxes inside it.
 * @typedef {object} Item
 * @property {number} index index among all boxes; a box comes before the boxes inside it
 * @property {Item | null} parent the scope around it
 * @property {Item[]} parts the boxes inside, in order
 * @property {boolean} isScope whether it can be opened
 * @property {string} label name inside its scope
 * @property {string} kind "traced" or "untraced" for a scope; else "input", "output", "adapted_layer", "module", "op" or
 *   "eager"
 * @property {string} detail class and shape, or what an operation reads
 * @property {string} op the fx opcode
 * @property {string} target qualified name of the module, or name of the function
 * @property {string} shape shape of its value
 * @property {string} dtype dtype of its value
 * @property {string[]} marks the adapted layers that it stands for
 * @property {string[]} paths the modules that it stands for
 * @property {number} width length of the reflection vectors
 * @property {number} rank number of reflection vectors
 * @property {number} parameters number of parameters of the modules
 * @property {number} count number of identical neighbors that it stands for
 * @property {boolean} varied whether they differ in size
 * @property {Flow | null} flow
 * @property {string[]} skipped layers without an adapter in it
 * @property {string[]} trained layers in it that are trained in full
 */

/**
 * A row of `hra_fx.report`.
 * @typedef {object} Row
 * @property {string} path
 * @property {string} layer_type
 * @property {string} adapter
 * @property {boolean} active
 * @property {number} d
 * @property {number} r
 * @property {number} parameters
 * @property {number} rotation
 * @property {number} angle
 * @property {number} orthogonality
 * @property {number} mean_angle
 * @property {number[]} angles
 * @property {number} share
 */

/** @typedef {{words: string, unit: string, top: number, values: Map<string, number>}} Heat */
/** @typedef {{path: string, reason: string, item: Item}} SkippedLayer */

/**
 * @typedef {object} Drawing
 * @property {string} title
 * @property {string} facts
 * @property {number | null} depth
 * @property {Item[]} items
 * @property {Map<string, Row[]>} rows by layer; several adapters are several rows
 * @property {Map<string, Heat>} heats by name
 * @property {string} heat the heatmap that is shown at first
 * @property {string[]} palette
 * @property {string} unknown color of a value that could not be computed
 * @property {SkippedLayer[]} skipped
 */

/** @typedef {any[] | {at: number[], values: any[]}} Column */

const TEXTS = ["label", "kind", "detail", "op", "target", "shape", "dtype"];
const LISTS = ["marks", "paths"];

/**
 * A column as an array.
 * @param {Column | undefined} column
 * @param {number} count
 * @returns {any[]}
 */
function dense(column, count) {
  if (Array.isArray(column)) return column;
  const values = new Array(count).fill(0);
  column?.at.forEach((place, index) => {
    values[place] = column.values[index];
  });
  return values;
}

/**
 * A number of the report. JSON has no NaN and infinity, so they are texts.
 * @param {any} value
 * @returns {any}
 */
function plain(value) {
  return typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value;
}

/**
 * @param {any} data
 * @returns {Item[]}
 */
function itemsOf(data) {
  const count = data.count;
  /** @type {Item[]} */
  const items = Array.from(
    { length: count },
    (_, index) => /** @type {any} */ ({ index, parts: [], skipped: [], trained: [] }),
  );
  for (const name of [...TEXTS, ...LISTS, "parent", "width", "rank", "parameters", "count", "varied", "layering"]) {
    const values = dense(data.items[name], count);
    items.forEach((item, index) => {
      /** @type {any} */ (item)[name] = values[index];
    });
  }
  for (const item of /** @type {any[]} */ (items)) {
    for (const name of TEXTS) item[name] = data.texts[item[name]];
    for (const name of LISTS) item[name] = (item[name] || []).map((/** @type {number} */ text) => data.texts[text]);
    item.isScope = item.kind === "traced" || item.kind === "untraced";
    item.count += 1;
    item.varied = Boolean(item.varied);
    item.flow = item.layering ? data.layerings[item.layering - 1] : null;
    item.parent = item.index ? items[item.parent] : null;
    item.parent?.parts.push(item);
    if (!item.paths.length) item.paths = item.isScope && item.target ? [item.target] : item.marks;
  }
  return items;
}

/**
 * @param {any} data
 * @returns {Map<string, Row[]>}
 */
function rowsOf(data) {
  const { count, texts, numbers } = data.rows;
  /** @type {any[]} */
  const rows = Array.from({ length: count }, () => ({ angles: [] }));
  for (const [name, column] of Object.entries(texts)) {
    dense(/** @type {Column} */ (column), count).forEach((text, index) => {
      rows[index][name] = data.texts[text];
    });
  }
  for (const [name, column] of Object.entries(numbers)) {
    dense(/** @type {Column} */ (column), count).forEach((value, index) => {
      rows[index][name] = name === "angles" ? (value || []).map(plain) : plain(value);
    });
  }
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
  const data = JSON.parse(json);
  const items = itemsOf(data);
  const heats = Object.entries(data.heats).map(([name, heat]) => {
    const values = heat.paths.map((/** @type {number} */ text, /** @type {number} */ index) => {
      return [data.texts[text], plain(heat.values[index])];
    });
    return /** @type {[string, Heat]} */ ([name, { ...heat, values: new Map(values) }]);
  });
  const skipped = data.skipped.paths.map((/** @type {number} */ text, /** @type {number} */ index) => {
    const item = /** @type {Item} */ (items[data.skipped.items[index]]);
    item.skipped.push(data.texts[text]);
    return { path: data.texts[text], reason: data.texts[data.skipped.reasons[index]], item };
  });
  data.trained.paths.forEach((/** @type {number} */ text, /** @type {number} */ index) => {
    items[data.trained.items[index]].trained.push(data.texts[text]);
  });
  return { ...data, items, rows: rowsOf(data), heats: new Map(heats), skipped };
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
 * The layers in a box that could carry reflections and do not.
 * @param {Item} item
 * @returns {string[]}
 */
export function skippedIn(item) {
  return [...item.skipped, ...item.parts.flatMap(skippedIn)];
}
