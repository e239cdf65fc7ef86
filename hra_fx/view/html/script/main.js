// The controls of the page.

/** @import { Item } from "./data.js" */
/** @import { Mode } from "./painting.js" */
import { around, Boxes } from "./boxes.js";
import { read } from "./data.js";
import { Heatmap } from "./heat.js";
import { listenToKeys } from "./keyboard.js";
import { explainHeat, explainLooks } from "./legend.js";
import { Panel } from "./panel.js";
import { listenToPrints } from "./printing.js";
import { Search } from "./search.js";
import { Stage } from "./stage.js";
import { byId, html } from "./svg.js";
import { counted } from "./text.js";

const drawing = read(byId("data").textContent ?? "");
const heatmap = new Heatmap(drawing);
const boxes = new Boxes(drawing);
const adapted = drawing.rows.size > 0;
const UNROTATED = 1e-6; // |Q - I| of rounding

/** @param {string} path */
function isRotated(path) {
  return (drawing.rows.get(path) ?? []).some((row) => !(row.rotation < UNROTATED));
}

byId("title").textContent = drawing.title;
byId("facts").textContent = drawing.facts;
const stage = new Stage(byId("stage"), { boxes, heatmap, isRotated });
const panel = new Panel(byId("panel"), drawing, heatmap, choose);
const help = /** @type {HTMLDialogElement} */ (byId("help"));
const input = /** @type {HTMLInputElement} */ (byId("query"));
const elements = { input, regex: byId("regex"), status: byId("found"), hits: byId("hits") };
new Search(elements, drawing, choose).listen();
let chosenPath = "";

/**
 * Select a box and show it in the panel.
 * @param {Item} item
 * @param {string} [path] which of its layers
 */
function select(item, path = "") {
  chosenPath = path;
  stage.select(item);
  panel.show(item, path);
}

/**
 * Open the scopes around a box, select it and scroll to it.
 * @param {Item} item
 * @param {string} [path]
 */
function choose(item, path = "") {
  const closed = around(item).filter((scope) => !boxes.of(scope).open);
  if (closed.length) stage.changing(closed, () => boxes.set(closed, true));
  select(item, path);
  stage.reveal(item);
  stage.pane.scroller.focus({ preventScroll: true });
}

/** @param {Item} item */
function toggle(item) {
  stage.changing([item], () => boxes.set([item], !boxes.of(item).open));
  select(item);
}

/** @param {boolean} open */
function setAll(open) {
  const scopes = drawing.items.filter((item) => item.isScope && item.parent);
  boxes.set(scopes, open);
  if (!open && stage.selected && around(stage.selected).length > 1) stage.selected = null;
  stage.drawAll();
}

byId("stage").addEventListener("click", (event) => {
  const target = /** @type {Element} */ (event.target);
  const group = /** @type {HTMLElement | null} */ (target.closest(".box"));
  // Ignore the second click of a double click: the first one has opened the module.
  if (!group || event.detail > 1 || target.closest(".dragged")) return;
  const item = drawing.items[Number(group.dataset.index)];
  if (!item.parent) return;
  if (item.isScope && (!boxes.of(item).open || target.closest(".title"))) toggle(item);
  else {
    select(item, target.matches(".cell") ? item.marks[cellOf(target)] : "");
    stage.reveal(item); // the panel takes a part of the window
  }
});

/** @param {Element} cell */
function cellOf(cell) {
  return [...(cell.parentElement?.querySelectorAll(":scope > .cell") ?? [])].indexOf(cell);
}

function showHeat() {
  explainHeat(byId("scale"), drawing, heatmap);
  stage.recolor();
  if (panel.isOpen && stage.selected) panel.show(stage.selected, chosenPath);
}

const heats = /** @type {HTMLSelectElement} */ (byId("heat"));
for (const [name, { words }] of drawing.heats) heats.append(html("option", { value: name }, words));
heats.append(html("option", { value: "" }, "off"));
heats.value = heatmap.name;
heats.addEventListener("change", () => {
  heatmap.name = heats.value;
  showHeat();
});

explainLooks(byId("looks"), drawing);
for (const choice of /** @type {NodeListOf<HTMLInputElement>} */ (document.querySelectorAll("[name=look]"))) {
  choice.addEventListener("change", () => {
    stage.show(/** @type {Mode} */ (choice.value));
    stage.fit();
  });
}
for (const part of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll(".if-adapted"))) {
  part.hidden = !adapted;
}

const skipped = byId("skipped");
skipped.hidden = !drawing.skipped.length;
skipped.classList.toggle(
  "alarm",
  drawing.skipped.some(({ refused }) => refused),
);
skipped.textContent = `${counted(drawing.skipped.length, "layer")} not adapted`;
skipped.addEventListener("click", () => panel.showSkipped());

byId("expand").addEventListener("click", () => setAll(true));
byId("collapse").addEventListener("click", () => setAll(false));
byId("zoom-in").addEventListener("click", () => stage.zoomBy(1));
byId("zoom-out").addEventListener("click", () => stage.zoomBy(-1));
byId("fit").addEventListener("click", () => stage.fit());
byId("open-help").addEventListener("click", () => help.showModal());
byId("close-help").addEventListener("click", () => help.close());
byId("theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
});

stage.whenZoomed = () => {
  byId("zoom").textContent = `${Math.round(100 * stage.zoom)}%`;
};
stage.whenZoomed();
panel.whenClosed = () => stage.pane.scroller.focus({ preventScroll: true });
listenToKeys(boxes, {
  selected: () => stage.selected,
  select: (item) => {
    select(item);
    stage.reveal(item);
  },
  toggle,
  search: () => input.focus(),
  help: () => help.showModal(),
  escape: () => {
    if (document.activeElement === input) input.blur();
    else if (!help.open) panel.close();
  },
  zoom: (steps) => stage.zoomBy(steps),
  fit: () => stage.fit(),
});
listenToPrints(byId("paper"), stage);
showHeat();
performance.mark("drawn");
