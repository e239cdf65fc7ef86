// The heatmap: values as colors, interpolated as in hra_fx/reporting/heat.py.

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
   * The fill for a value and the color of text on it. Each is a pair for light and dark pages.
   * @param {number} value
   */
  colors(value) {
    const { palettes, unknown } = this.drawing;
    const { ends } = /** @type {Heat} */ (this.shown);
    const share = Math.min(Math.max((value - ends[0]) / (ends[1] - ends[0]), 0), 1);
    const fills = palettes.map((palette) => (Number.isNaN(value) ? unknown : between(palette, share)));
    return { fill: pair(fills), ink: pair(fills.map(inkOn)) };
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
    const [light, dark] = this.drawing.palettes;
    const fills = light.map((fill, step) => pair([fill, dark[step]]));
    bar.style.background = `linear-gradient(to right, ${fills.join(", ")})`;
    const [low, high] = heat.ends.map((value) => `${Number(value.toPrecision(6))}${heat.unit}`);
    element.append(low, bar, high);
  }
}

/** @param {string[]} fills */
function pair([light, dark]) {
  return `light-dark(${light}, ${dark})`;
}

/**
 * @param {string[]} palette
 * @param {number} share
 */
function between(palette, share) {
  const place = share * (palette.length - 1);
  const index = Math.min(Math.floor(place), palette.length - 2);
  const [low, high] = [channels(palette[index]), channels(palette[index + 1])];
  return `#${low.map((channel, at) => hex(channel + (high[at] - channel) * (place - index))).join("")}`;
}

/**
 * Black or white, whichever has the higher contrast on a color.
 * @param {string} fill
 */
function inkOn(fill) {
  const [red, green, blue] = channels(fill).map((channel) => {
    const share = channel / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000000" : "#ffffff";
}

/** @param {string} color */
function channels(color) {
  return [1, 3, 5].map((start) => Number.parseInt(color.slice(start, start + 2), 16));
}

/** @param {number} channel */
function hex(channel) {
  return Math.round(channel).toString(16).padStart(2, "0");
}
