// The heatmap: values as colors, interpolated as in hra_fx/reporting/colormap.py.

/** @import { Drawing, Heat } from "./data.js" */

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
   */
  mean(paths) {
    const heat = this.shown;
    if (!heat || !paths.length) return undefined;
    let sum = 0;
    for (const path of paths) sum += heat.values.get(path) ?? Number.NaN;
    return sum / paths.length;
  }

  /** @param {number} value */
  text(value) {
    const heat = this.shown;
    if (!heat) return "";
    return Number.isNaN(value) ? "unknown" : value.toFixed(decimals(heat.top)) + heat.unit;
  }

  /** @param {number} value */
  color(value) {
    const { palette, unknown } = this.drawing;
    if (!this.shown || Number.isNaN(value)) return unknown;
    const place = Math.min(Math.max(value / this.shown.top, 0), 1) * (palette.length - 1);
    const index = Math.min(Math.floor(place), palette.length - 2);
    const [low, high] = [channels(palette[index]), channels(palette[index + 1])];
    return `#${low.map((channel, at) => hex(channel + (high[at] - channel) * (place - index))).join("")}`;
  }
}

/**
 * Black or white, whichever has the higher contrast on a color.
 * @param {string} fill
 */
export function inkOn(fill) {
  const [red, green, blue] = channels(fill).map((channel) => {
    const share = channel / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (luminance + 0.05) ** 2 > 0.05 * 1.05 ? "#000000" : "#ffffff";
}

/** @param {number} top */
function decimals(top) {
  return Math.max(0, Math.min(2 - Math.floor(Math.log10(top)), 6));
}

/** @param {string} color */
function channels(color) {
  return [1, 3, 5].map((start) => Number.parseInt(color.slice(start, start + 2), 16));
}

/** @param {number} channel */
function hex(channel) {
  return Math.round(channel).toString(16).padStart(2, "0");
}
