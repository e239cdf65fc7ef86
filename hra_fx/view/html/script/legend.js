// The legend: colors and looks of boxes.

/** @import { Drawing } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { html } from "./svg.js";

/** Looks of boxes, their texts, and whether a drawing has them.
 * @type {[string, string, (drawing: Drawing) => boolean][]} */
const LOOKS = [
  ["adapted_layer", "adapted layer, with its adapter on top", ({ rows }) => rows.size > 0],
  ["traced", "module; click to open", has("traced")],
  ["untraced", "module that is not traced: no edges inside", has("untraced")],
  ["module", "other module or operation", (drawing) => has("module")(drawing) || has("op")(drawing)],
  ["eager", "not traced, without adapters", has("eager")],
  ["skipped", "layer without an adapter", ({ skipped }) => skipped.length > 0],
  ["trained", "trained in full", ({ items }) => items.some(({ trained }) => trained.length)],
];

/** @param {string} kind */
function has(kind) {
  return (/** @type {Drawing} */ { items }) => items.some((item) => item.parent && item.kind === kind);
}

/**
 * The looks of boxes.
 * @param {HTMLElement} element
 * @param {Drawing} drawing
 */
export function explainLooks(element, drawing) {
  const looks = LOOKS.filter(([, , shown]) => shown(drawing)).map(([look, words]) =>
    html("li", {}, html("i", { class: `look ${look}` }), words),
  );
  element.replaceChildren(...looks);
}

/**
 * The color scale, from 0 to the largest value.
 * @param {HTMLElement} element
 * @param {Drawing} drawing
 * @param {Heatmap} heatmap
 */
export function explainHeat(element, drawing, heatmap) {
  const heat = heatmap.shown;
  if (!heat) {
    element.replaceChildren();
    return;
  }
  const bar = html("span", { class: "bar" });
  bar.style.background = `linear-gradient(to right, ${drawing.palette.join(", ")})`;
  const [low, high] = [0, heat.top].map((value) => `${Number(value.toPrecision(4))}${heat.unit}`);
  const isRotated = [...heat.values.values()].some((value) => value > 1e-6);
  const note = isRotated ? [] : [html("span", { class: "note" }, "no layer is rotated yet")];
  element.replaceChildren(html("span", { class: "measure" }, heat.words), low, bar, high, ...note);
}
