// The picture of the model: open modules, colors, selection, zoom and scroll position.

/** @import { Item } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { marksOf, skippedIn } from "./data.js";
import { svg } from "./elements.js";
import { unfold } from "./unfold.js";

const STEP = 1.25;
const [SMALLEST, LARGEST] = [0.05, 4];
const READABLE = 0.6; // minimum zoom for fitting a picture
const CLICK = 4; // a pointer that moves further is dragging
const TIP_PATHS = 12; // paths in a tooltip

export class Stage {
  /**
   * @param {{scroller: HTMLElement, pictures: HTMLElement}} elements
   * @param {Item[]} items
   * @param {Heatmap} heatmap
   */
  constructor({ scroller, pictures }, items, heatmap) {
    this.scroller = scroller;
    this.items = items;
    this.heatmap = heatmap;
    this.zoom = 1;
    /** @type {Item | null} */
    this.selected = null;
    this.whenZoomed = () => {};
    /** The modules that the reader has opened.
     * @type {Set<Item>} */
    this.unfolded = new Set();
    /** The picture of a module, without what the reader has opened.
     * @type {Map<Item, SVGSVGElement>} */
    this.pictures = new Map();
    /** The module in whose picture a box is.
     * @type {Map<Item, Item>} */
    this.shownIn = new Map();
    for (const picture of pictures.querySelectorAll("svg")) {
      const [root, ...inside] = groupsOf(picture).map((group) => this.itemOf(group));
      this.pictures.set(root, picture);
      for (const item of inside) this.shownIn.set(item, root);
    }
    pictures.remove();
    /** The part of the page's address that names an open module.
     * @type {Map<Item, string>} */
    this.addresses = new Map();
    for (const root of this.pictures.keys()) {
      const name = encodeURIComponent(root.paths[0] ?? root.label);
      const taken = [...this.addresses.values()].includes(name); // by the first call of the module
      if (root.parent) this.addresses.set(root, taken ? `${name}~${root.index}` : name);
    }
    this.draw();
    this.fit();
    this.#listenToWheel();
    this.#listenToDrags();
  }

  /** @returns {SVGSVGElement} */
  get picture() {
    return /** @type {SVGSVGElement} */ (this.scroller.firstElementChild);
  }

  /**
   * The box of an element.
   * @param {SVGGElement} group
   */
  itemOf(group) {
    return this.items[Number(group.dataset.index)];
  }

  /** The boxes of the picture, outer ones first. */
  get boxes() {
    return groupsOf(this.picture)
      .map((group) => this.itemOf(group))
      .filter((item) => item.parent);
  }

  /** @param {Item} item */
  #group(item) {
    return /** @type {SVGGElement} */ (this.picture.querySelector(`[data-index="${item.index}"]`));
  }

  /**
   * Whether a box can be opened: it is a closed module.
   * @param {Item} item
   */
  opens(item) {
    return this.addresses.has(item) && !this.unfolded.has(item);
  }

  /**
   * The modules that must be open to show a box, outer ones first.
   * @param {Item} item
   * @returns {Item[]}
   */
  around(item) {
    const scope = this.shownIn.get(item);
    return scope?.parent ? [...this.around(scope), scope] : [];
  }

  /** @param {Item} root */
  #copy(root) {
    const picture = /** @type {SVGSVGElement} */ (this.pictures.get(root));
    for (const group of groupsOf(picture)) if (!group.id) describe(group, this.itemOf(group), root, this.pictures);
    return /** @type {SVGSVGElement} */ (picture.cloneNode(true));
  }

  /** Draw the model with the open modules. */
  draw() {
    this.scroller.replaceChildren(this.#copy(this.items[0]));
    for (const item of this.items.filter((item) => this.unfolded.has(item))) {
      const inside = this.#group(item) && this.#copy(item).querySelector("g");
      if (inside) unfold(this.#group(item), inside);
    }
    this.recolor();
    while (this.selected && !this.#group(this.selected)) this.selected = this.shownIn.get(this.selected) ?? null;
    this.select(this.selected);
    this.setZoom(this.zoom);
  }

  /**
   * Open or close a module, which stays where it is in the window.
   * @param {Item} item
   */
  toggle(item) {
    const before = this.#group(item).getBoundingClientRect();
    if (!this.unfolded.delete(item)) this.unfolded.add(item);
    this.draw();
    const after = this.#group(item).getBoundingClientRect();
    this.scroller.scrollBy(after.x + after.width / 2 - before.x - before.width / 2, after.y - before.y);
  }

  /** Color everything by the heatmap. */
  recolor() {
    for (const group of groupsOf(this.picture)) paint(group, this.itemOf(group), this.heatmap);
  }

  /**
   * Highlight only this box and its edges.
   * @param {Item | null} item
   */
  select(item) {
    this.selected = item;
    for (const group of groupsOf(this.picture))
      group.setAttribute("aria-selected", String(this.itemOf(group) === item));
    for (const edge of /** @type {NodeListOf<SVGElement>} */ (this.picture.querySelectorAll(".edge"))) {
      edge.classList.toggle("lit", (edge.dataset.ends ?? "").split(" ").includes(String(item?.index)));
    }
    if (item) this.scroller.setAttribute("aria-activedescendant", this.#group(item).id);
    else this.scroller.removeAttribute("aria-activedescendant");
  }

  get #size() {
    return this.picture.viewBox.baseVal;
  }

  /** Fit the width, as far as the text stays readable. */
  fit() {
    const { width } = this.#size;
    const room = this.scroller.clientWidth;
    this.setZoom(Math.max(Math.min(1, room / width), READABLE));
    this.scroller.scrollTo(0, 0);
    const [first] = this.boxes;
    if (first) this.reveal(first);
  }

  /** @param {number} steps */
  zoomBy(steps) {
    this.setZoom(this.zoom * STEP ** steps);
  }

  /**
   * Zoom around a point of the window, by default its middle.
   * @param {number} zoom
   * @param {{x: number, y: number}} [point]
   */
  setZoom(zoom, point) {
    const frame = this.scroller.getBoundingClientRect();
    const x = point ? point.x - frame.left : frame.width / 2;
    const y = point ? point.y - frame.top : frame.height / 2;
    const { scrollLeft, scrollTop } = this.scroller;
    const factor = Math.min(Math.max(zoom, SMALLEST), LARGEST) / this.zoom;
    this.zoom *= factor;
    const { width, height } = this.#size;
    this.picture.style.width = `${width * this.zoom}px`;
    this.picture.style.height = `${height * this.zoom}px`;
    this.scroller.scrollTo({ left: (scrollLeft + x) * factor - x, top: (scrollTop + y) * factor - y });
    this.whenZoomed();
  }

  /**
   * Scroll until a box is visible.
   * @param {Item} item
   */
  reveal(item) {
    this.#group(item).querySelector(".frame")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #listenToWheel() {
    this.scroller.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        const point = { x: event.clientX, y: event.clientY };
        this.setZoom(this.zoom * Math.exp(-event.deltaY * (event.deltaMode ? 0.06 : 0.002)), point);
      },
      { passive: false },
    );
  }

  #listenToDrags() {
    const { scroller } = this;
    /** @type {{x: number, y: number, left: number, top: number, moved: boolean} | null} */
    let drag = null;
    scroller.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button > 1) return;
      drag = {
        x: event.clientX,
        y: event.clientY,
        left: scroller.scrollLeft,
        top: scroller.scrollTop,
        moved: false,
      };
    });
    scroller.addEventListener("pointermove", (event) => {
      if (!drag) return;
      const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
      if (!drag.moved && Math.hypot(x, y) < CLICK) return;
      if (!drag.moved) scroller.setPointerCapture(event.pointerId);
      drag.moved = true;
      scroller.classList.add("dragged");
      scroller.scrollTo(drag.left - x, drag.top - y);
    });
    const stop = () => {
      // The click event after a drag comes later, and must see the class.
      setTimeout(() => scroller.classList.remove("dragged"));
      drag = null;
    };
    scroller.addEventListener("pointerup", stop);
    scroller.addEventListener("pointercancel", stop);
  }
}

/**
 * The boxes of a picture.
 * @param {SVGSVGElement} picture
 * @returns {SVGGElement[]}
 */
function groupsOf(picture) {
  return [...picture.querySelectorAll("g")];
}

/**
 * Add what is read aloud, the tooltip of a box, and the mark of a module that can be opened or closed.
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {Item} root the module in whose picture it is
 * @param {Map<Item, SVGSVGElement>} pictures
 */
function describe(group, item, root, pictures) {
  const skipped = skippedIn(item).length;
  const words = [item.label, item.detail, item.count > 1 ? `× ${item.count}` : ""];
  if (skipped) words.push(item.isScope ? `${skipped} not adapted` : "not adapted");
  if (item.trained.length && !item.isScope) words.push("trained in full");
  group.setAttribute("role", item.parent ? "treeitem" : "presentation");
  group.id = `box-${item.index}`;
  group.setAttribute("aria-label", words.filter(Boolean).join(", "));
  group.classList.toggle("opens", pictures.has(item) && item !== root);
  const paths = item.marks.length ? item.marks : item.paths;
  const lines = [item.label, item.detail, item.shape, ...paths.slice(0, TIP_PATHS)].filter(Boolean);
  if (paths.length > TIP_PATHS) lines.push(`… and ${paths.length - TIP_PATHS} more`);
  if (item.parent) group.prepend(svg("title", {}, [...new Set(lines)].join("\n")));
  const frame = group.querySelector(":scope > .frame");
  if (!pictures.has(item) || !frame) return;
  const [x, y] = ["x", "y"].map((name) => Number(frame.getAttribute(name)));
  const d = item === root ? `M${x + 4} ${y + 11}l7 0l-3.5 5z` : `M${x + 6} ${y + 7}l5 3.5l-5 3.5z`;
  group.append(svg("path", { class: "twist", d }));
}

/**
 * Color the strip and the cells of a box by the heatmap, and write the value into the strip.
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {Heatmap} heatmap
 */
function paint(group, item, heatmap) {
  const strip = /** @type {SVGElement | null} */ (group.querySelector(":scope > .strip"));
  const line = /** @type {SVGElement | null | undefined} */ (strip?.nextElementSibling);
  if (strip && line) {
    line.dataset.text ??= line.textContent ?? "";
    const value = item.rank ? heatmap.mean(item.marks) : undefined; // without an active adapter nothing is rotated
    const { fill, ink } = value === undefined ? { fill: "", ink: "" } : heatmap.colors(value);
    strip.style.fill = fill;
    line.style.fill = ink;
    const words = value === undefined || item.op === "eager" ? "" : heatmap.text(value);
    line.textContent = line.dataset.text + (words && ` · ${item.marks.length > 1 ? "mean " : ""}${words}`);
  }
  const cells = /** @type {NodeListOf<SVGElement>} */ (group.querySelectorAll(":scope > .cell"));
  const marks = cells.length ? marksOf(item) : [];
  cells.forEach((cell, place) => {
    const value = heatmap.mean([marks[place]]);
    cell.style.fill = value === undefined ? "" : heatmap.colors(value).fill;
    const words = value === undefined ? "" : `\n${heatmap.text(value)}`;
    cell.replaceChildren(svg("title", {}, marks[place] + words));
  });
}
