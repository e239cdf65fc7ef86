// Elements and their texts. Attributes and texts are set one by one; nothing is parsed as markup.

const SPACE = "http://www.w3.org/2000/svg";

/**
 * An SVG element.
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {(Node | string)[]} children
 * @returns {SVGElementTagNameMap[Tag]}
 */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SPACE, tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, typeof value === "number" ? String(Math.round(value * 10) / 10) : value);
  }
  element.append(...children);
  return element;
}

/**
 * An HTML element. False attributes are left out, true ones have no value; `on...` are listeners.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, string | number | boolean | EventListener>} [attributes]
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function html(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/**
 * An element of the page by its id.
 * @param {string} id
 */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
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
  return value ? value.toFixed(1) + unit : `0${unit}`;
}

/**
 * Decimals for two digits of a value below 1.
 * @param {number} value
 */
function decimals(value) {
  return 1 - Math.floor(Math.log10(value));
}
