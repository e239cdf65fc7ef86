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
