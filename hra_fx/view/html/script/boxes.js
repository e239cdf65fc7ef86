// Which scopes are open, the size of every box, and its position in the scope around it.

/** @import { Drawing, Flow, Item } from "./data.js" */
/** @import { Arrangement } from "./layout.js" */
import { marksOf, skippedIn } from "./data.js";
import { layered } from "./layout.js";
import { DETAIL, NAME, shorten, widthOf } from "./text.js";

export const STRIP = 19; // height of the adapter strip on top of its layer
export const HEADER = 27; // height of an open scope's title
export const PAD = 14;
export const CELL = 8; // height of a line of cells
export const CELLS = 24; // maximum per line
const EDGE = 12; // space below the title and above the lower border without edges

/**
 * A placed box; `x` and `y` are the position of its upper left corner inside its scope.
 * @typedef {object} Box
 * @property {string} name
 * @property {string} detail
 * @property {string} summary `detail` of a closed scope, with the number of layers that are not adapted
 * @property {string} strip text of the adapter
 * @property {string} badge "× 6" for a box that stands for several modules
 * @property {string[]} marks
 * @property {boolean} open
 * @property {number} x
 * @property {number} y
 * @property {number} width
 * @property {number} height
 * @property {number} enter
 * @property {number} leave
 * @property {Arrangement | null} inner
 * @property {{x: number, y: number}} body position of the inside
 */

export class Boxes {
  /** @param {Drawing} drawing */
  constructor(drawing) {
    this.items = drawing.items;
    this.root = drawing.items[0];
    /** @type {Box[]} */
    this.boxes = this.items.map((item) => described(item));
    this.#placeAll(this.root);
  }

  /** @param {Item} item */
  of(item) {
    return this.boxes[item.index];
  }

  /**
   * Open and close scopes.
   * @param {Item[]} items
   * @param {boolean} open
   */
  set(items, open) {
    for (const item of items) if (item.isScope && item !== this.root) this.of(item).open = open;
    const changed = new Set(items.flatMap((item) => [item, ...around(item)]));
    const inwards = [...changed].sort((a, b) => b.index - a.index);
    for (const item of inwards) this.#place(item);
  }

  /**
   * Place scopes that were never open before the scopes around them.
   * @param {Item} item
   */
  #placeAll(item) {
    if (this.of(item).open) for (const part of item.parts) this.#placeAll(part);
    this.#place(item);
  }

  /** @param {Item} item */
  #place(item) {
    const box = this.of(item);
    box.inner = null;
    if (!item.isScope) sizeLeaf(item, box);
    else if (!box.open) sizeClosed(box);
    else this.#sizeOpen(item, box);
  }

  /**
   * @param {Item} item
   * @param {Box} box
   */
  #sizeOpen(item, box) {
    const parts = item.parts.map((part) => this.of(part));
    for (const part of item.parts) if (!this.of(part).width) this.#placeAll(part);
    const inner = layered(parts, /** @type {Flow} */ (item.flow));
    parts.forEach((part, index) => void Object.assign(part, inner.corners[index]));
    box.inner = inner;
    if (item === this.root) {
      Object.assign(box, { width: inner.width, height: inner.height, body: { x: 0, y: 0 } });
      return;
    }
    const title = 18 + widthOf(box.name, NAME, true) + 8 + widthOf(box.detail, DETAIL) + badgeWidth(box) + 2 * PAD;
    box.width = Math.max(title, inner.width + 2 * PAD);
    box.body = { x: (box.width - inner.width) / 2, y: HEADER + (item.flow?.inputs.length ? 0 : EDGE) };
    box.height = box.body.y + inner.height + (item.flow?.outputs.length ? 0 : EDGE);
    box.enter = box.body.x + inner.enter - box.width / 2;
    box.leave = box.body.x + inner.leave - box.width / 2;
  }

  /**
   * The position of a box in the whole drawing.
   * @param {Item} item
   */
  absolute(item) {
    const { width, height } = this.of(item);
    let [x, y] = [0, 0];
    for (let at = item; at.parent; at = at.parent) {
      const { body } = this.of(at.parent);
      x += this.of(at).x + body.x;
      y += this.of(at).y + body.y;
    }
    return { x, y, width, height };
  }

  /**
   * The visible boxes, outer ones first, without the root.
   * @param {Item} [item]
   * @returns {Item[]}
   */
  visible(item = this.root) {
    return this.of(item).open ? item.parts.flatMap((part) => [part, ...this.visible(part)]) : [];
  }
}

/**
 * The scopes around a box, innermost first.
 * @param {Item} item
 */
export function around(item) {
  const scopes = [];
  for (let at = item.parent; at; at = at.parent) scopes.push(at);
  return scopes;
}

/**
 * The texts of a box.
 * @param {Item} item
 * @returns {Box}
 */
function described(item) {
  const name = shorten(item.label);
  const marks = item.isScope ? marksOf(item) : item.marks;
  let detail = shorten(item.detail);
  const skipped = item.isScope ? skippedIn(item).length : 0;
  if (item.isScope && marks.length) detail += ` · ${marks.length} adapted`;
  if (detail === name) detail = "";
  const badge = item.count > 1 ? `× ${item.count}` : "";
  const nowhere = { x: 0, y: 0, width: 0, height: 0, enter: 0, leave: 0, inner: null, body: { x: 0, y: 0 } };
  const summary = detail + (skipped ? ` · ${skipped} not adapted` : "");
  return { name, detail, summary, strip: stripOf(item), badge, marks, open: item.open, ...nowhere };
}

/** @param {Item} item */
function stripOf(item) {
  if (item.kind !== "adapted_layer") return "";
  if (!item.marks.length) return "same layer, called again";
  if (item.op === "eager") return `r ${item.rank} · d ${item.width} · not traced`;
  return item.rank ? `r ${item.rank} · d ${item.width}` : "no active adapter";
}

/**
 * @param {Item} item
 * @param {Box} box
 */
function sizeLeaf(item, box) {
  if (item.kind === "adapted_layer") {
    // The value comes after the strip's text: space for the longest one.
    const strip =
      Math.max(widthOf(box.strip, DETAIL, true), widthOf("weight unchanged", DETAIL, true)) +
      widthOf(box.marks.length > 1 ? " · mean 0.00000°" : " · 0.00000°", DETAIL, true) +
      12;
    const name = widthOf(box.name, NAME, true) + badgeWidth(box);
    const cells = box.marks.length > 1 ? Math.min(box.marks.length, CELLS) * 6 : 0;
    box.width = Math.max(name, widthOf(box.detail, DETAIL), strip, cells) + 2 * PAD;
    box.height = STRIP + 39 + cellsHeight(box.marks.length);
    return;
  }
  const words = widthOf(box.name, NAME) + (box.detail ? 7 + widthOf(box.detail, DETAIL) : 0);
  const port = item.kind === "input" || item.kind === "output";
  box.width = Math.max(words + badgeWidth(box) + 2 * PAD, port ? 60 : 70);
  box.height = port ? 24 : 29;
}

/** @param {Box} box */
function sizeClosed(box) {
  const words = Math.max(widthOf(box.name, NAME, true) + badgeWidth(box), widthOf(box.summary, DETAIL)) + 18;
  Object.assign(box, { enter: 0, leave: 0 });
  box.width = Math.max(words + 2 * PAD, 120);
  box.height = 47 + (box.marks.length ? CELL + 2 : 0);
}

/**
 * Height of the cells of a box that stands for several layers.
 * @param {number} count
 */
export function cellsHeight(count) {
  return count > 1 ? Math.ceil(count / CELLS) * CELL + 5 : 0;
}

/** @param {Box} box */
export function badgeWidth(box) {
  return box.badge ? widthOf(box.badge, DETAIL, true) + 22 : 0;
}
