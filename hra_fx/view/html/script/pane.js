// One view of the model: a drawing that scrolls and zooms.

/** @import { Item } from "./data.js" */
/** @import { Paint } from "./painting.js" */
import { around } from "./boxes.js";
import { color, drawn, edges, move } from "./painting.js";
import { html, svg } from "./svg.js";

export const MARGIN = 28;

export class Pane {
  /**
   * @param {Paint} paint
   */
  constructor(paint) {
    this.paint = paint;
    this.root = paint.boxes.root;
    /** @type {SVGGElement} */
    this.group = svg("g");
    this.width = 0;
    this.height = 0;
    this.svg = svg("svg", { class: "drawing" }, this.group);
    const label = `${paint.mode} model: boxes`;
    this.scroller = html("div", { class: "scroller", role: "tree", tabindex: 0, "aria-label": label }, this.svg);
    this.element = html("section", { class: `pane ${paint.mode}` }, this.scroller);
    this.draw();
  }

  /** Draw everything. */
  draw() {
    const group = drawn(this.root, this.paint);
    group.setAttribute("role", "presentation");
    group.classList.add(this.paint.mode);
    this.group.replaceWith(group);
    this.group = group;
    this.recolor();
    this.resize();
  }

  /**
   * Redraw scopes that were opened or closed, and move everything around them.
   * @param {Item[]} items
   */
  redraw(items) {
    const { boxes } = this.paint;
    const outer = items.filter((item) => !around(item).some((scope) => items.includes(scope)));
    for (const item of outer) {
      const group = drawn(item, this.paint);
      this.groupOf(item)?.replaceWith(group);
      this.recolor(group);
    }
    for (const scope of new Set(outer.flatMap(around))) {
      const group = this.groupOf(scope);
      if (!group) continue;
      for (const part of scope.parts) {
        const inside = this.groupOf(part);
        if (inside) move(inside, boxes.of(part));
      }
      group.querySelector(":scope > .inside > .edges")?.replaceChildren(...edges(scope, this.paint));
      this.#reframe(scope, group);
    }
    this.resize();
  }

  /**
   * Update the outline of a scope whose inside has changed its size.
   * @param {Item} scope
   * @param {SVGGElement} group
   */
  #reframe(scope, group) {
    const { width, height, body } = this.paint.boxes.of(scope);
    const set = (/** @type {string} */ part, /** @type {Record<string, number>} */ values) => {
      const element = group.querySelector(`:scope > ${part}`);
      for (const [name, value] of Object.entries(values)) element?.setAttribute(name, String(value));
    };
    set(".frame", { width, height });
    set(".title > .bar", { width: width - 1 });
    group.querySelector(":scope > .inside")?.setAttribute("transform", `translate(${body.x} ${body.y})`);
    const badge = group.querySelector(":scope > .title > .badge");
    if (!badge) return;
    const wide = Number(badge.getAttribute("width"));
    badge.setAttribute("x", String(width - 8 - wide));
    group.querySelector(":scope > .title > .badge-words")?.setAttribute("x", String(width - 8 - wide / 2));
  }

  /** Update to the size of the drawing. */
  resize() {
    const { width, height } = this.paint.boxes.of(this.root);
    this.width = Math.ceil(width) + 2 * MARGIN;
    this.height = Math.ceil(height) + 2 * MARGIN;
    this.svg.setAttribute("viewBox", `${-MARGIN} ${-MARGIN} ${this.width} ${this.height}`);
  }

  /**
   * Color boxes by the heatmap.
   * @param {Element} [within]
   */
  recolor(within = this.svg) {
    const { items } = this.paint.boxes;
    const groups = /** @type {SVGGElement[]} */ ([...within.querySelectorAll(".box.adapted_layer, .box.closed")]);
    if (within.matches(".box.adapted_layer, .box.closed")) groups.push(/** @type {SVGGElement} */ (within));
    for (const group of groups) color(group, items[Number(group.dataset.index)], this.paint);
  }

  /**
   * The elements of a box, if it is drawn.
   * @param {Item} item
   * @returns {SVGGElement | null}
   */
  groupOf(item) {
    return /** @type {SVGGElement | null} */ (
      /** @type {unknown} */ (document.getElementById(`${this.paint.mode}-${item.index}`)) ??
        this.svg.querySelector(`#${this.paint.mode}-${item.index}`)
    );
  }

  /**
   * Highlight only this box and its edges.
   * @param {Item | null} item
   */
  select(item) {
    for (const old of this.svg.querySelectorAll(".selected")) {
      old.classList.remove("selected");
      old.setAttribute("aria-selected", "false");
    }
    for (const old of this.svg.querySelectorAll(".ring, .edges > .lit")) old.remove();
    const group = item && this.groupOf(item);
    if (!item || !group || !item.parent) {
      this.scroller.removeAttribute("aria-activedescendant");
      return;
    }
    const { width, height } = this.paint.boxes.of(item);
    group.append(svg("rect", { class: "ring", x: -1.5, y: -1.5, width: width + 3, height: height + 3, rx: 8 }));
    group.classList.add("selected");
    group.setAttribute("aria-selected", "true");
    this.scroller.setAttribute("aria-activedescendant", group.id);
    const place = item.parent.parts.indexOf(item);
    const lit = edges(item.parent, this.paint, (source, target) => source === place || target === place);
    for (const path of lit) path.classList.add("lit");
    this.groupOf(item.parent)
      ?.querySelector(":scope > .inside > .edges")
      ?.append(...lit);
  }
}
