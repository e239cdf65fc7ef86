// What the colors and the looks of boxes mean.

/** @import { Drawing } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { html } from "./svg.js";

/** Looks of boxes and their words, with what a drawing must have for them to be told.
 * @type {[string, string, (drawing: Drawing) => boolean][]} */
const LOOKS = [
  ["adapted_layer", "layer with its reflection on top", ({ rows }) => rows.size > 0],
  ["traced", "module; click to open", has("traced")],
  ["untraced", "module that runs as Python: no edges inside", has("untraced")],
  ["module", "other module or operation", (drawing) => has("module")(drawing) || has("op")(drawing)],
  ["eager", "Python module without adapters", has("eager")],
  ["skipped", "could carry reflections, has none", ({ skipped }) => skipped.length > 0],
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
 * The colors of heat, from nothing to the largest value.
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
  const rotated = [...heat.values.values()].some((value) => value > 1e-6);
  const note = rotated ? [] : [html("span", { class: "note" }, "no layer is rotated yet")];
  element.replaceChildren(html("span", { class: "measure" }, heat.words), low, bar, high, ...note);
}
