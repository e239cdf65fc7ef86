// Search for boxes by the names of their modules or by class.

/** @import { Drawing, Item } from "./data.js" */
import { html } from "./elements.js";

const SHOWN = 100;

/** @typedef {{name: string, detail: string, item: Item, path: string, texts: string[]}} Entry */

export class Search {
  /**
   * @param {{input: HTMLInputElement, status: HTMLElement, hits: HTMLElement}} elements
   * @param {Drawing} drawing
   * @param {(item: Item, path: string) => void} choose
   */
  constructor(elements, drawing, choose) {
    this.elements = elements;
    this.drawing = drawing;
    this.choose = choose;
    /** @type {Entry[] | null} */
    this.entries = null;
    /** @type {Entry[]} */
    this.found = [];
    this.active = -1;
    const { input, hits } = elements;
    input.addEventListener("input", () => this.update());
    input.addEventListener("focus", () => this.update());
    input.addEventListener("keydown", (event) => this.#key(event));
    // Keep the focus in the field until the click.
    hits.addEventListener("pointerdown", (event) => event.preventDefault());
    hits.addEventListener("click", (event) => {
      const hit = /** @type {Element} */ (event.target).closest("[data-hit]");
      if (hit) this.#choose(Number(/** @type {HTMLElement} */ (hit).dataset.hit));
    });
    input.addEventListener("blur", () => this.close());
  }

  close() {
    this.elements.hits.hidden = true;
    this.elements.status.hidden = true;
    this.elements.input.setAttribute("aria-expanded", "false");
  }

  update() {
    const { input, status } = this.elements;
    const query = input.value.trim();
    this.active = -1;
    input.removeAttribute("aria-activedescendant");
    if (!query) {
      this.close();
      return;
    }
    this.entries ??= entriesOf(this.drawing.items);
    const matches = matcher(query);
    this.found = this.entries.filter(({ texts }) => texts.some(matches));
    status.textContent = this.found.length ? `${this.found.length} found` : "nothing found";
    status.hidden = false;
    this.#list();
  }

  #list() {
    const { hits, input } = this.elements;
    const lines = this.found
      .slice(0, SHOWN)
      .map(({ name, detail }, index) =>
        html(
          "li",
          { id: `hit-${index}`, role: "option", "aria-selected": "false", "data-hit": index },
          html("b", {}, name),
          html("small", {}, detail),
        ),
      );
    if (this.found.length > SHOWN) {
      lines.push(html("li", { class: "more" }, `and ${this.found.length - SHOWN} more`));
    }
    hits.replaceChildren(...lines);
    hits.hidden = !lines.length;
    input.setAttribute("aria-expanded", String(lines.length > 0));
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const last = Math.min(this.found.length, SHOWN) - 1;
    if (event.key === "Enter" && this.found.length) this.#choose(Math.max(this.active, 0));
    else if (event.key === "ArrowDown") this.#activate(Math.min(this.active + 1, last));
    else if (event.key === "ArrowUp") this.#activate(Math.max(this.active - 1, 0));
    else return;
    event.preventDefault();
  }

  /** @param {number} index */
  #activate(index) {
    if (index < 0 || this.elements.hits.hidden) return;
    const { hits, input } = this.elements;
    hits.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    hits.children[index].setAttribute("aria-selected", "true");
    hits.children[index].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", `hit-${index}`);
    this.active = index;
  }

  /** @param {number} index */
  #choose(index) {
    const { item, path } = this.found[index];
    this.close();
    this.choose(item, path);
  }
}

/**
 * Whether a text contains a query, or matches it as a regular expression.
 * @param {string} query
 * @returns {(text: string) => boolean}
 */
function matcher(query) {
  const low = query.toLowerCase();
  let pattern = /(?!)/;
  try {
    pattern = new RegExp(query, "i");
  } catch {} // an unfinished expression
  return (text) => text.toLowerCase().includes(low) || pattern.test(text);
}

/**
 * Every module once, at the box with its adapter if there is one; operations by their scope and name.
 * @param {Item[]} items
 * @returns {Entry[]}
 */
function entriesOf(items) {
  /** @type {Map<string, Entry>} */
  const byPath = new Map();
  /** @type {Entry[]} */
  const entries = [];
  for (const item of items) {
    if (!item.parent) continue;
    const paths = new Set([...item.paths, ...item.marks, ...item.skipped]);
    if (!paths.size) {
      const scope = item.parent.target;
      const name = scope ? `${scope}: ${item.label}` : item.label;
      entries.push({ name, detail: item.detail, item, path: "", texts: [item.label, item.target, item.detail] });
    }
    for (const path of paths) {
      const known = byPath.get(path);
      if (known && (known.item.marks.includes(path) || !item.marks.includes(path))) continue;
      const entry = { name: path, detail: item.detail, item, path, texts: [path, item.detail] };
      if (known) Object.assign(known, entry);
      else entries.push(entry);
      byPath.set(path, known ?? entry);
    }
  }
  return entries;
}
