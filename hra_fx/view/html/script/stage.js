// The window on the drawing: which view it shows, zoom and scroll position.

/** @import { Item } from "./data.js" */
/** @import { Mode, Paint } from "./painting.js" */
import { MARGIN, Pane } from "./pane.js";

const STEP = 1.25;
const [SMALLEST, LARGEST] = [0.05, 4];
const READABLE = 0.6; // minimum zoom for fitting the drawing
const CLICK = 4; // a pointer that moves further is dragging

export class Stage {
  /**
   * @param {HTMLElement} element
   * @param {Omit<Paint, "mode">} paint
   */
  constructor(element, paint) {
    this.element = element;
    this.paint = paint;
    this.zoom = 1;
    /** @type {Item | null} */
    this.selected = null;
    this.whenZoomed = () => {};
    this.pane = this.#open("adapted");
    this.fit();
  }

  /**
   * Choose the view.
   * @param {Mode} mode
   */
  show(mode) {
    const { scrollLeft, scrollTop } = this.pane.scroller;
    this.pane = this.#open(mode);
    this.pane.select(this.selected);
    this.#apply();
    this.pane.scroller.scrollTo(scrollLeft, scrollTop);
  }

  /** @param {Mode} mode */
  #open(mode) {
    const pane = new Pane({ ...this.paint, mode });
    this.#listen(pane.scroller);
    this.element.replaceChildren(pane.element);
    return pane;
  }

  /** @param {Item | null} item */
  select(item) {
    this.selected = item;
    this.pane.select(item);
  }

  /** Color everything again. */
  recolor() {
    this.pane.recolor();
  }

  /**
   * Draw scopes that were opened or closed; the title of a single one keeps its position on the screen.
   * @param {Item[]} items
   * @param {() => void} change
   */
  changing(items, change) {
    const { boxes } = this.paint;
    const anchor = items.length === 1 ? items[0] : null;
    const before = anchor && boxes.absolute(anchor);
    change();
    this.pane.redraw(items);
    this.pane.select(this.selected);
    this.#apply();
    if (!anchor || !before) return;
    const after = boxes.absolute(anchor);
    const { scrollLeft, scrollTop, clientWidth } = this.pane.scroller;
    const middle = scrollLeft + (after.x + after.width / 2 - before.x - before.width / 2) * this.zoom;
    // Of a module that is wider than the window, the left edge is shown.
    const left = (after.x + MARGIN / 2) * this.zoom;
    this.pane.scroller.scrollTo({
      left: after.width * this.zoom > clientWidth ? left : middle,
      top: scrollTop + (after.y - before.y) * this.zoom,
    });
  }

  /** Draw everything, after many scopes were opened or closed. */
  drawAll() {
    const { clientWidth } = this.pane.scroller; // read before drawing, to avoid a second layout
    this.pane.draw();
    this.pane.select(this.selected);
    this.#apply();
    this.pane.scroller.scrollTo({ left: this.#home(clientWidth), top: 0 });
  }

  /**
   * The horizontal scroll position at first: the left edge, or the first box in the middle if it is not visible there.
   * @param {number} room
   */
  #home(room) {
    const { boxes } = this.paint;
    const [first] = boxes.root.parts;
    if (!first) return 0;
    const { x, width } = boxes.absolute(first);
    if ((x + width + MARGIN) * this.zoom <= room) return 0;
    return (x + width / 2 + MARGIN) * this.zoom - room / 2;
  }

  /** Fit the width, as far as the text stays readable. */
  fit() {
    const { scroller, width } = this.pane;
    this.setZoom(Math.max(Math.min(1, scroller.clientWidth / width), READABLE));
    this.pane.scroller.scrollTo({ left: this.#home(scroller.clientWidth), top: 0 });
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
    const { scroller } = this.pane;
    const frame = scroller.getBoundingClientRect();
    const x = point ? point.x - frame.left : frame.width / 2;
    const y = point ? point.y - frame.top : frame.height / 2;
    const { scrollLeft, scrollTop } = scroller;
    const factor = Math.min(Math.max(zoom, SMALLEST), LARGEST) / this.zoom;
    this.zoom *= factor;
    this.#apply();
    this.pane.scroller.scrollTo({ left: (scrollLeft + x) * factor - x, top: (scrollTop + y) * factor - y });
    this.whenZoomed();
  }

  #apply() {
    const { svg, width, height } = this.pane;
    svg.style.width = `${width * this.zoom}px`;
    svg.style.height = `${height * this.zoom}px`;
  }

  /**
   * Scroll until a box is visible.
   * @param {Item} item
   */
  reveal(item) {
    const { x, y, width, height } = this.paint.boxes.absolute(item);
    const { scroller } = this.pane;
    const center = (/** @type {number} */ start, /** @type {number} */ size, /** @type {number} */ room) =>
      size * this.zoom > room ? (start + MARGIN) * this.zoom - 40 : (start + size / 2 + MARGIN) * this.zoom - room / 2;
    const seen =
      (x + MARGIN) * this.zoom >= scroller.scrollLeft &&
      (y + MARGIN) * this.zoom >= scroller.scrollTop &&
      (x + width + MARGIN) * this.zoom <= scroller.scrollLeft + scroller.clientWidth &&
      (y + height + MARGIN) * this.zoom <= scroller.scrollTop + scroller.clientHeight;
    if (seen) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.pane.scroller.scrollTo({
      left: center(x, width, scroller.clientWidth),
      top: center(y, height, scroller.clientHeight),
      behavior: still ? "auto" : "smooth",
    });
  }

  /** @param {HTMLElement} scroller */
  #listen(scroller) {
    scroller.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        const point = { x: event.clientX, y: event.clientY };
        this.setZoom(this.zoom * Math.exp(-event.deltaY * (event.deltaMode ? 0.06 : 0.002)), point);
      },
      { passive: false },
    );
    this.#listenToDrags(scroller);
    this.#listenToPinches(scroller);
  }

  /** @param {HTMLElement} scroller */
  #listenToDrags(scroller) {
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

  /** @param {HTMLElement} scroller */
  #listenToPinches(scroller) {
    let apart = 0;
    scroller.addEventListener("touchstart", (event) => {
      apart = event.touches.length === 2 ? spread(event.touches) : 0;
    });
    scroller.addEventListener(
      "touchmove",
      (event) => {
        if (event.touches.length !== 2 || !apart) return;
        event.preventDefault();
        const [one, other] = event.touches;
        const now = spread(event.touches);
        const point = { x: (one.clientX + other.clientX) / 2, y: (one.clientY + other.clientY) / 2 };
        this.setZoom((this.zoom * now) / apart, point);
        apart = now;
      },
      { passive: false },
    );
  }
}

/** @param {TouchList} touches */
function spread([one, other]) {
  return Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
}
