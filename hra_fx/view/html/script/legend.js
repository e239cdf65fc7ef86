// The legend: colors and looks of boxes.

/** @import { Drawing } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { html } from "./svg.js";

/** Looks of boxes, their texts, and whether a drawing has them.
 * @type {[string, string, (drawing: Drawing) => boolean][]} */
const LOOKS = [
  ["adapted_layer", "adapted layer", ({ rows }) => rows.size > 0],
  ["trained", "trained in full", ({ items }) => items.some(({ trained }) => trained.length)],
  ["skipped", "not targeted", ({ skipped }) => skipped.some(({ refused }) => !refused)],
  ["refused", "targeted, but not adapted", ({ skipped }) => skipped.some(({ refused }) => refused)],
  ["traced", "module; click to open", has("traced")],
  ["untraced", "module that is not traced, without edges", has("untraced")],
  ["module", "other operation", (drawing) => has("module")(drawing) || has("op")(drawing)],
  ["eager", "not traced, without adapters", has("eager")],
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
 * The color scale with the values at its ends.
 * @param {HTMLElement} element
 * @param {Drawing} drawing
 * @param {Heatmap} heatmap
 */
export function explainHeat(element, drawing, heatmap) {
  const heat = heatmap.shown;
  const note = drawing.trained ? [] : [html("span", { class: "note" }, "not trained yet (identity)")];
  if (!heat) {
    element.replaceChildren(...note);
    return;
  }
  const bar = html("span", { class: "bar" });
  bar.style.background = heatmap.gradient;
  const [low, high] = heat.ends.map((value) => `${Number(value.toPrecision(6))}${heat.unit}`);
  element.replaceChildren(html("span", { class: "measure" }, heat.words), low, bar, high, ...note);
}
