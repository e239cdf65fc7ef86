// The controls of the page.

/** @import { Item } from "./data.js" */
import { read } from "./data.js";
import { byId, counted, html } from "./elements.js";
import { Heatmap } from "./heat.js";
import { Panel } from "./panel.js";
import { Search } from "./search.js";
import { Stage } from "./stage.js";

const drawing = read(byId("data").textContent ?? "");
const heatmap = new Heatmap(drawing);
const scroller = byId("scroller");

byId("title").textContent = drawing.title;
byId("facts").textContent = drawing.facts;
const stage = new Stage({ scroller, pictures: byId("pictures") }, drawing.items, heatmap);
const panel = new Panel(byId("panel"), drawing, heatmap, choose);
const help = /** @type {HTMLDialogElement} */ (byId("help"));
const input = /** @type {HTMLInputElement} */ (byId("query"));
new Search({ input, status: byId("found"), hits: byId("hits") }, drawing, choose);
let chosenPath = "";

/**
 * Select a box of the picture and show it in the panel.
 * @param {Item} item
 * @param {string} [path] which of its layers
 */
function select(item, path = "") {
  chosenPath = path;
  stage.select(item);
  panel.show(item, path);
  stage.reveal(item); // the panel takes a part of the window
  note("replaceState");
}

/**
 * Name the open modules and then the selected box in the address of the page.
 * @param {"pushState" | "replaceState"} way with a step to go back, or without
 */
function note(way) {
  const { selected, unfolded, addresses } = stage;
  const names = drawing.items.filter((item) => unfolded.has(item)).map((item) => addresses.get(item));
  const path = selected && !addresses.has(selected) ? chosenPath || selected.paths[0] : "";
  if (path) names.push(encodeURIComponent(path));
  try {
    history[way](null, "", `#${names.join(",")}`);
  } catch {} // a page in a frame has no address, and some browsers limit the number of changes
}

/** Open the modules in the address of the page, and no others, and select the last box in it. */
function visit() {
  stage.unfolded.clear();
  /** @type {[Item, string] | undefined} */
  let last;
  for (const name of location.hash.slice(1).split(",")) {
    const scope = [...stage.addresses].find(([, address]) => address === name)?.[0];
    const path = (/** @type {Item} */ item) =>
      [...item.paths, ...item.marks].find((own) => encodeURIComponent(own) === name) ?? "";
    const item = scope ?? drawing.items.find((item) => item.parent && path(item));
    if (!item) continue;
    for (const open of scope ? [...stage.around(item), scope] : stage.around(item)) stage.unfolded.add(open);
    last = [item, path(item)];
  }
  stage.draw();
  if (last) select(...last);
}

/**
 * Open the modules around a box, and select the box.
 * @param {Item} item
 * @param {string} [path]
 */
function choose(item, path = "") {
  const closed = stage.around(item).filter((scope) => !stage.unfolded.has(scope));
  for (const scope of closed) stage.unfolded.add(scope);
  if (closed.length) {
    stage.draw();
    note("pushState");
  }
  if (item.parent) select(item, path);
  else panel.show(item, path); // the model itself
  scroller.focus({ preventScroll: true });
}

/**
 * Open or close a module, and select it.
 * @param {Item} item
 */
function toggle(item) {
  stage.toggle(item);
  note("pushState");
  select(item);
}

byId("stage").addEventListener("click", (event) => {
  const target = /** @type {Element} */ (event.target);
  const group = /** @type {SVGGElement | null} */ (target.closest("g"));
  // Ignore the second click of a double click: the first one has opened the module.
  if (!group || event.detail > 1 || target.closest(".dragged")) return;
  const item = stage.itemOf(group);
  if (stage.opens(item) || target.matches(".twist")) toggle(item);
  else if (item.parent) select(item, target.matches(".cell") ? item.marks[cellOf(target)] : "");
});

/** @param {Element} cell */
function cellOf(cell) {
  return [...(cell.parentElement?.querySelectorAll(":scope > .cell") ?? [])].indexOf(cell);
}

function showHeat() {
  heatmap.explain(byId("scale"));
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
for (const part of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll(".if-adapted"))) {
  part.hidden = !drawing.rows.size;
}

const skipped = byId("skipped");
skipped.hidden = !drawing.skipped.length;
skipped.classList.toggle(
  "alarm",
  drawing.skipped.some(({ refused }) => refused),
);
skipped.textContent = `${counted(drawing.skipped.length, "layer")} not adapted`;
skipped.addEventListener("click", () => panel.showSkipped());

const shapes = byId("shapes");
shapes.hidden = !drawing.items.some(({ shape }) => shape);
shapes.addEventListener("click", () => {
  shapes.setAttribute("aria-pressed", String(scroller.classList.toggle("shapes")));
});

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
panel.whenClosed = () => scroller.focus({ preventScroll: true });

/** @type {Record<string, () => void>} */
const KEYS = {
  "/": () => input.focus(),
  "?": () => help.showModal(),
  s: () => shapes.click(),
  "+": () => stage.zoomBy(1),
  "=": () => stage.zoomBy(1),
  "-": () => stage.zoomBy(-1),
  0: () => stage.fit(),
};
/** The keys that work while the drawing has the focus.
 * @type {Record<string, () => void>} */
const DRAWING_KEYS = {
  ...KEYS,
  ArrowDown: () => step(1),
  ArrowRight: () => step(1),
  ArrowUp: () => step(-1),
  ArrowLeft: () => step(-1),
  Home: () => select(stage.boxes[0]),
  Enter: enter,
  " ": enter,
  Backspace: () => {
    const { selected, unfolded } = stage;
    const scope = selected && [...stage.around(selected), selected].filter((item) => unfolded.has(item)).at(-1);
    if (scope) toggle(scope);
  },
};

/** Open or close the selected module, and show any other box in the panel. */
function enter() {
  const { selected, addresses } = stage;
  if (selected) (addresses.has(selected) ? toggle : select)(selected);
}

/**
 * Select the next or the previous box, in the order of the drawing.
 * @param {number} steps
 */
function step(steps) {
  const { boxes, selected } = stage;
  const next = selected ? boxes[boxes.indexOf(selected) + steps] : boxes[0];
  if (next) select(next);
}

function leave() {
  if (document.activeElement === input) input.blur();
  else if (!help.open) panel.close();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") leave();
  const target = /** @type {Element} */ (event.target);
  if (target.closest("input, select, dialog")) return;
  const keys = target === document.body || target.closest("#scroller") ? DRAWING_KEYS : KEYS;
  if (!Object.hasOwn(keys, event.key)) return;
  keys[event.key]();
  event.preventDefault();
});
showHeat();
addEventListener("hashchange", visit);
if (location.hash) visit();
performance.mark("drawn");
