// Widths of texts, and shortening.

export const NAME = 12.5;
export const DETAIL = 11;

const LETTERS = 34;
const family = getComputedStyle(document.documentElement).fontFamily;
const pen = /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
/** @type {Map<string, Map<string, number>>} */
const known = new Map();

/**
 * Width of a text in the page's font.
 * @param {string} text
 * @param {number} size
 * @param {boolean} [bold]
 */
export function widthOf(text, size, bold = false) {
  const font = `${bold ? "600 " : ""}${size}px ${family}`;
  let widths = known.get(font);
  if (!widths) {
    widths = new Map();
    known.set(font, widths);
  }
  let width = widths.get(text);
  if (width === undefined) {
    if (pen.font !== font) pen.font = font;
    width = pen.measureText(text).width;
    widths.set(text, width);
  }
  return width;
}

/**
 * A long text with its middle left out.
 * @param {string} text
 * @param {number} [letters]
 */
export function shorten(text, letters = LETTERS) {
  const signs = Array.from(text);
  if (signs.length <= letters) return text;
  const tail = (letters - 1) >> 1;
  return `${signs.slice(0, letters - 1 - tail).join("")}…${signs.slice(signs.length - tail).join("")}`;
}

/**
 * "1 layer", "2 layers".
 * @param {number} count
 * @param {string} noun
 */
export function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/**
 * A value with its unit, as `with_unit` of hra_fx/reporting/heat.py.
 * @param {number} value
 * @param {string} unit
 */
export function withUnit(value, unit) {
  if (Number.isNaN(value)) return "unknown";
  if (value > 0 && value < 1e-6) return value.toExponential(0) + unit;
  if (value > 0 && value < 0.1) return Number(value.toPrecision(2)).toFixed(decimals(value)).replace(/0+$/, "") + unit;
  return value ? value.toFixed(unit ? 1 : 3) + unit : `0${unit}`;
}

/**
 * Decimals for two digits of a value below 1.
 * @param {number} value
 */
function decimals(value) {
  return 1 - Math.floor(Math.log10(value));
}
