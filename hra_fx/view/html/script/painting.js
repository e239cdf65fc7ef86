// A box as SVG elements. The colors of looks are in style/, the colors of the heatmap are set here.

/** @import { Item } from "./data.js" */
/** @import { Box, Boxes } from "./boxes.js" */
/** @import { Heatmap } from "./heat.js" */
import { badgeWidth, CELL, CELLS, HEADER, PAD, STRIP } from "./boxes.js";
import { svg } from "./svg.js";
import { DETAIL, NAME, widthOf } from "./text.js";

/** What a pane shows: the base model, the adapted one, or the folded one.
 * @typedef {"base" | "adapted" | "folded"} Mode */

/**
 * @typedef {object} Paint
 * @property {Mode} mode
 * @property {Boxes} boxes
 * @property {Heatmap} heatmap
 * @property {(path: string) => boolean} isRotated whether folding changes the weight of a layer
 */

const MANY = 48; // maximum number of cells in a closed scope; with more layers, a cell is the mean of several

/**
 * A box, and its inside if it is open.
 * @param {Item} item
 * @param {Paint} paint
 * @returns {SVGGElement}
 */
export function drawn(item, paint) {
  const box = paint.boxes.of(item);
  const classes = ["box", item.kind, item.isScope ? (box.open ? "open" : "closed") : "leaf"];
  if (item.skipped.length) classes.push(item.refused.length ? "refused" : "skipped");
  if (item.trained.length) classes.push("trained");
  const group = svg("g", {
    class: classes.join(" "),
    id: `${paint.mode}-${item.index}`,
    "data-index": item.index,
    role: "treeitem",
    "aria-selected": "false",
    "aria-label": spoken(item, box),
  });
  if (item.isScope) group.setAttribute("aria-expanded", String(box.open));
  move(group, box);
  group.append(svg("title", {}, tip(item)));
  if (box.open) paintOpen(group, item, box, paint);
  else if (item.isScope) paintClosed(group, box, paint);
  else if (item.kind === "adapted_layer") paintSite(group, box, paint);
  else paintLine(group, item, box);
  return group;
}

/**
 * Move a box to its position.
 * @param {SVGGElement} group
 * @param {Box} box
 */
export function move(group, box) {
  group.setAttribute("transform", `translate(${Math.round(box.x * 10) / 10} ${Math.round(box.y * 10) / 10})`);
}

/**
 * The edges of an open scope: one path of lines and one of arrows.
 * @param {Item} item
 * @param {Paint} paint
 * @param {(source: number, target: number) => boolean} [chosen]
 * @returns {SVGPathElement[]}
 */
export function edges(item, { boxes }, chosen = () => true) {
  const { inner } = boxes.of(item);
  const routes = (inner?.routes ?? []).filter(({ source, target }) => chosen(source, target));
  if (!routes.length) return [];
  const lines = svg("path", { class: "edge", d: routes.map(({ path }) => path).join("") });
  const tips = routes.filter(({ target }) => target >= 0);
  const arrows = tips.map(({ x, y }) => `M${Math.round(x * 10) / 10} ${Math.round(y * 10) / 10}l-3.5 -7h7z`);
  return [lines, svg("path", { class: "arrow", d: arrows.join("") })];
}

/** @param {Item} item */
function tip(item) {
  const paths = item.isScope ? item.paths : item.marks.length ? item.marks : item.paths;
  const lines = [item.label, item.detail, item.shape, ...paths.slice(0, 12)].filter(Boolean);
  if (paths.length > 12) lines.push(`… and ${paths.length - 12} more`);
  return [...new Set(lines)].join("\n");
}

/**
 * @param {Item} item
 * @param {Box} box
 */
function spoken(item, box) {
  const words = [item.label, item.isScope ? box.summary : item.detail, box.badge, box.strip];
  if (item.skipped.length && !item.isScope) words.push("not adapted");
  if (item.trained.length && !item.isScope) words.push("trained in full");
  return words.filter(Boolean).join(", ");
}

/**
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {Box} box
 */
function paintLine(group, item, box) {
  const port = item.kind === "input" || item.kind === "output";
  group.append(outline(box, port ? box.height / 2 : 5));
  const middle = (box.width - badgeWidth(box)) / 2;
  const line = words(box.name, middle, box.height / 2 + 4.5, "name", "middle");
  if (box.detail) line.append(svg("tspan", { class: "detail", dx: 7 }, box.detail));
  group.append(line);
  paintBadge(group, box, box.width - 8, 6);
}

/**
 * A layer with its adapter as a strip on top. The base model has no strip; the strip of the folded one says whether the
 * weight changed.
 * @param {SVGGElement} group
 * @param {Box} box
 * @param {Paint} paint
 */
function paintSite(group, box, paint) {
  const { width } = box;
  group.append(outline(box, 6));
  const top = paint.mode === "base" ? STRIP / 2 : STRIP;
  if (paint.mode !== "base") {
    const bend = STRIP - 6;
    const d = `M0 ${STRIP}v${-bend}a6 6 0 0 1 6 -6h${width - 12}a6 6 0 0 1 6 6v${bend}z`;
    group.append(svg("path", { class: "strip", d }), words("", width / 2, 13.5, "strip-words", "middle"));
  }
  group.append(words(box.name, (width - badgeWidth(box)) / 2, top + 16, "name strong", "middle"));
  group.append(words(box.detail, width / 2, top + 31.5, "detail", "middle"));
  if (box.marks.length > 1 && paint.mode !== "base") {
    paintCells(
      group,
      box.marks.map((mark) => [mark]),
      { x: PAD - 4, y: top + 38, width: width - 2 * PAD + 8 },
    );
  }
  paintBadge(group, box, width - 8, top + 4);
}

/**
 * @param {SVGGElement} group
 * @param {Box} box
 * @param {Paint} paint
 */
function paintClosed(group, box, paint) {
  if (box.badge) group.append(svg("rect", { class: "frame under", x: 4, y: 4, ...extent(box), rx: 6 }));
  const left = PAD + 16;
  group.append(outline(box, 6), svg("path", { class: "twist", d: `M${PAD - 2} 11l6 4.5l-6 4.5z` }));
  group.append(words(box.name, left, 20, "name strong"), words(box.summary, left, 36.5, "detail"));
  if (box.marks.length && paint.mode !== "base") {
    const size = Math.ceil(box.marks.length / MANY);
    const bins = [];
    for (let start = 0; start < box.marks.length; start += size) bins.push(box.marks.slice(start, start + size));
    paintCells(group, bins, { x: PAD - 4, y: 44, width: box.width - 2 * PAD + 8 }, bins.length);
  }
  paintBadge(group, box, box.width - 8, 7);
}

/**
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {Box} box
 * @param {Paint} paint
 */
function paintOpen(group, item, box, paint) {
  const { inner } = box;
  if (!inner) return;
  if (item.parent) {
    const title = svg("g", { class: "title" });
    const left = PAD + 16;
    const line = words(box.name, left, 18, "name strong");
    if (box.detail) line.append(svg("tspan", { class: "detail", dx: 8 }, box.detail));
    title.append(svg("rect", { class: "bar", x: 0.5, y: 0.5, width: box.width - 1, height: HEADER - 2, rx: 7 }));
    title.append(svg("path", { class: "twist", d: `M${PAD - 4} 10.5h9l-4.5 6z` }), line);
    group.append(outline(box, 8), title);
    paintBadge(title, box, box.width - 8, 6);
  }
  const inside = svg("g", { class: "inside", role: "group", transform: `translate(${box.body.x} ${box.body.y})` });
  inside.append(svg("g", { class: "edges" }, ...edges(item, paint)));
  for (const part of item.parts) inside.append(drawn(part, paint));
  group.append(inside);
}

/**
 * Cells, one for each list of layers.
 * @param {SVGGElement} group
 * @param {string[][]} layers
 * @param {{x: number, y: number, width: number}} place
 * @param {number} [most] maximum per line
 */
function paintCells(group, layers, place, most = CELLS) {
  const across = Math.min(layers.length, most);
  const step = place.width / across;
  layers.forEach((marks, index) => {
    const x = place.x + (index % across) * step;
    const y = place.y + Math.floor(index / across) * CELL;
    const gap = step > 3 ? 1 : 0;
    const cell = svg("rect", { class: "cell", y, height: CELL - 1 });
    cell.setAttribute("x", x.toFixed(2));
    cell.setAttribute("width", (step - gap).toFixed(2));
    marksOfCell.set(cell, marks);
    cell.append(svg("title"));
    group.append(cell);
  });
}

/** The layers that a cell stands for.
 * @type {WeakMap<Element, string[]>} */
export const marksOfCell = new WeakMap();

/**
 * @param {SVGGElement} group
 * @param {Box} box
 * @param {number} right
 * @param {number} y
 */
function paintBadge(group, box, right, y) {
  if (!box.badge) return;
  const width = widthOf(box.badge, DETAIL, true) + 10;
  group.append(svg("rect", { class: "badge", x: right - width, y, width, height: 16, rx: 8 }));
  group.append(words(box.badge, right - width / 2, y + 12, "badge-words", "middle"));
}

/**
 * Color the parts of a box by the heatmap, and set the text of its strip.
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {Paint} paint
 */
export function color(group, item, paint) {
  const box = paint.boxes.of(item);
  const { heatmap, mode } = paint;
  const strip = /** @type {SVGElement | null} */ (group.querySelector(":scope > .strip"));
  const line = /** @type {SVGElement | null} */ (group.querySelector(":scope > .strip-words"));
  if (strip && line) {
    const value = item.rank ? heatmap.mean(box.marks) : undefined; // without an active adapter nothing is rotated
    const changed = box.marks.some(paint.isRotated);
    const shown = value === undefined ? "" : ` · ${box.marks.length > 1 ? "mean " : ""}${heatmap.text(value)}`;
    line.textContent =
      mode === "adapted" ? box.strip + shown : (changed ? "weight changed" : "weight unchanged") + shown;
    strip.classList.toggle("unchanged", mode === "folded" && !changed);
    const tint = value === undefined ? { fill: "", ink: "" } : heatmap.colors(value);
    strip.style.fill = tint.fill;
    line.style.fill = tint.ink;
  }
  for (const cell of /** @type {NodeListOf<SVGElement>} */ (group.querySelectorAll(":scope > .cell"))) {
    const marks = marksOfCell.get(cell) ?? [];
    const value = heatmap.mean(marks);
    cell.style.fill = value === undefined ? "" : heatmap.colors(value).fill;
    const names = marks.length > 1 ? `${marks[0]} … ${marks[marks.length - 1]}` : marks[0];
    const shown = value === undefined ? "" : `\n${heatmap.text(value)}`;
    /** @type {Element} */ (cell.firstChild).textContent = names + shown;
  }
}

/**
 * @param {Box} box
 * @param {number} radius
 */
function outline(box, radius) {
  return svg("rect", { class: "frame", ...extent(box), rx: radius });
}

/** @param {Box} box */
function extent({ width, height }) {
  return { width, height };
}

/**
 * @param {string} text
 * @param {number} x
 * @param {number} y
 * @param {string} look
 * @param {string} [anchor]
 */
function words(text, x, y, look, anchor = "start") {
  const size = look.startsWith("name") ? NAME : DETAIL;
  return svg("text", { class: look, x, y, "font-size": size, "text-anchor": anchor }, text);
}
