// The pictures of the model, one at a time: colors, selection, zoom and scroll position.

/** @import { Item } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { marksOf, skippedIn } from "./data.js";
import { html, svg } from "./elements.js";

const STEP = 1.25;
const [SMALLEST, LARGEST] = [0.05, 4];
const READABLE = 0.6; // minimum zoom for fitting a picture
const CLICK = 4; // a pointer that moves further is dragging
const TIP_PATHS = 12; // paths in a tooltip

export class Stage {
  /**
   * @param {{scroller: HTMLElement, trail: HTMLElement, pictures: HTMLElement}} elements
   * @param {Item[]} items
   * @param {Heatmap} heatmap
   */
  constructor({ scroller, trail, pictures }, items, heatmap) {
    this.scroller = scroller;
    this.trail = trail;
    this.items = items;
    this.heatmap = heatmap;
    this.zoom = 1;
    /** @type {Item | null} */
    this.selected = null;
    this.whenZoomed = () => {};
    /** The picture of a module.
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
    /** The part of the page's address that names a picture.
     * @type {Map<Item, string>} */
    this.addresses = new Map();
    for (const item of this.pictures.keys()) {
      const name = item.parent ? encodeURIComponent(item.paths[0] ?? item.label) : "";
      const taken = [...this.addresses.values()].includes(name); // by the first call of the module
      this.addresses.set(item, taken ? `${name}~${item.index}` : name);
    }
    this.root = items[0];
    this.show(this.root);
    this.#listenToWheel();
    this.#listenToDrags();
  }

  /** @returns {SVGSVGElement} */
  get picture() {
    return /** @type {SVGSVGElement} */ (this.pictures.get(this.root));
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
    return item !== this.root && this.pictures.has(item);
  }

  /**
   * Show the picture of a module.
   * @param {Item} root
   */
  show(root) {
    this.root = root;
    this.select(null);
    for (const group of groupsOf(this.picture)) {
      const item = this.itemOf(group);
      if (!group.id) describe(group, item, this.opens(item));
    }
    const way = [];
    for (let at = /** @type {Item | undefined} */ (root); at; at = this.shownIn.get(at)) way.unshift(at);
    const steps = way.slice(0, -1).map((item) => {
      const go = () => {
        location.hash = this.addresses.get(item) ?? "";
      };
      return html("li", {}, html("button", { class: "link", onclick: go }, item.label));
    });
    this.trail.replaceChildren(html("ol", {}, ...steps, html("li", { "aria-current": "page" }, root.label)));
    this.trail.hidden = !steps.length;
    this.scroller.replaceChildren(this.picture);
    this.recolor();
    this.fit();
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
    const { width, height } = this.picture.viewBox.baseVal;
    return { width, height };
  }

  /** Fit the width, as far as the text stays readable. */
  fit() {
    const { width } = this.#size;
    const room = this.scroller.clientWidth;
    this.setZoom(Math.max(Math.min(1, room / width), READABLE));
    this.scroller.scrollTo(0, 0);
    const [first] = this.boxes.slice(this.root.parent ? 1 : 0);
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
 * Add what is read aloud and the tooltip of a box.
 * @param {SVGGElement} group
 * @param {Item} item
 * @param {boolean} opens
 */
function describe(group, item, opens) {
  const skipped = skippedIn(item).length;
  const words = [item.label, item.detail, item.count > 1 ? `× ${item.count}` : ""];
  if (skipped) words.push(item.isScope ? `${skipped} not adapted` : "not adapted");
  if (item.trained.length && !item.isScope) words.push("trained in full");
  group.setAttribute("role", item.parent ? "treeitem" : "presentation");
  group.id = `box-${item.index}`;
  group.setAttribute("aria-label", words.filter(Boolean).join(", "));
  group.classList.toggle("opens", opens);
  const paths = item.marks.length ? item.marks : item.paths;
  const lines = [item.label, item.detail, item.shape, ...paths.slice(0, TIP_PATHS)].filter(Boolean);
  if (paths.length > TIP_PATHS) lines.push(`… and ${paths.length - TIP_PATHS} more`);
  if (item.parent) group.prepend(svg("title", {}, [...new Set(lines)].join("\n")));
  const frame = group.querySelector(":scope > .frame");
  if (!opens || !frame) return;
  const [x, y] = ["x", "y"].map((name) => Number(frame.getAttribute(name)));
  group.append(svg("path", { class: "twist", d: `M${x + 6} ${y + 7}l5 3.5l-5 3.5z` }));
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
