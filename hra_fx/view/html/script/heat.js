// The heatmap: values as colors.

/** @import { Drawing, Heat } from "./data.js" */
import { html, withUnit } from "./elements.js";

export class Heatmap {
  /** @param {Drawing} drawing */
  constructor(drawing) {
    this.drawing = drawing;
    /** The name of the measure that is shown, or "" for none. */
    this.name = drawing.heats.has(drawing.heat) ? drawing.heat : "";
  }

  /** @returns {Heat | undefined} */
  get shown() {
    return this.drawing.heats.get(this.name);
  }

  /**
   * The mean value of some layers, `undefined` if no heatmap is shown.
   * @param {string[]} paths
   * @param {Heat | undefined} [heat] another heatmap
   */
  mean(paths, heat = this.shown) {
    if (!heat || !paths.length) return undefined;
    let sum = 0;
    for (const path of paths) sum += heat.values.get(path) ?? Number.NaN;
    return sum / paths.length;
  }

  /**
   * A value of the heatmap that is shown, or of another one.
   * @param {number} value
   * @param {Heat | undefined} [heat]
   */
  text(value, heat = this.shown) {
    if (!heat) return "";
    if (heat.unit) return withUnit(value, heat.unit);
    return Number.isNaN(value) ? "unknown" : value.toFixed(3);
  }

  /**
   * The fill for a value and the color of text on it, for light and dark pages.
   * @param {number} value
   */
  colors(value) {
    const { colors } = this.drawing;
    const { ends } = /** @type {Heat} */ (this.shown);
    const share = Math.min(Math.max((value - ends[0]) / (ends[1] - ends[0]), 0), 1);
    const [fill, ink] = colors[Number.isNaN(value) ? colors.length - 1 : Math.round(share * (colors.length - 2))];
    return { fill, ink };
  }

  /**
   * The scale with the values at its ends.
   * @param {HTMLElement} element
   */
  explain(element) {
    const heat = this.shown;
    element.replaceChildren();
    if (!heat) return;
    const bar = html("span", { class: "bar" });
    const fills = this.drawing.colors.slice(0, -1).map(([fill]) => fill);
    bar.style.background = `linear-gradient(to right, ${fills.filter((_, step) => step % 4 === 0).join(", ")})`;
    const [low, high] = heat.ends.map((value) => `${Number(value.toPrecision(6))}${heat.unit}`);
    element.append(low, bar, high);
  }
}
