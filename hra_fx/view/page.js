// Shows one picture at a time, finds layers, zooms, and describes the selected layer. Each address is that of a picture
// (#/ and the path of its module), a layer (# and its path) or a section. Without a script, all are below each other.

const find = (/** @type {string} */ selector, root = document) => root.querySelector(selector);
const [main, panel, query, hits, zoomTools] = ["main", "aside", "input", "search ul", ".zoom"].map((name) => find(name));
const SHOWN = 40; // layers that are found
const READABLE = 0.6; // the smallest zoom that fits the width by itself

/** The layers and modules by path: their boxes, and what a search looks at. */
const layers = new Map();
for (const element of document.querySelectorAll("figure [id]")) {
  // A box of several layers has an element without content for each of the others.
  const box = element.classList.contains("name") ? element.parentNode : element;
  layers.set(element.id, { box, detail: linesOf(box)[0] });
}
// Without an id, the browser does not scroll to the element by itself.
for (const element of document.querySelectorAll("figure [id]")) element.removeAttribute("id");

/** The rows of the report by layer. */
const rows = new Map();
for (const row of document.querySelectorAll("tr[data-path]")) {
  const { path } = row.dataset;
  rows.set(path, [...(rows.get(path) ?? []), row]);
}

function linesOf(box) {
  return (find(":scope > title", box)?.textContent ?? "").split("\n");
}

function create(tag, text, ...children) {
  const made = document.createElement(tag);
  made.append(text, ...children);
  return made;
}

// Show what an address names: a picture, or the picture with a layer.
function show(address) {
  const layer = layers.get(address);
  const view = layer?.box.closest("figure") ?? document.getElementById(address) ?? find("figure");
  const changed = !view.classList.contains("shown");
  for (const other of main.children) other.classList.toggle("shown", other === view);
  for (const link of document.querySelectorAll("nav a")) {
    const isCurrent = view.matches("figure") ? link.hash === "#/" : link.hash === `#${view.id}`;
    link.toggleAttribute("aria-current", isCurrent);
  }
  find(".selected")?.classList.remove("selected");
  panel.hidden = !layer;
  if (changed) {
    main.scrollTo(0, 0);
    fit();
  }
  zoomTools.hidden = !view.matches("figure");
  if (!layer) return;
  layer.box.classList.add("selected");
  describe(layer.box, address);
  const at = changed ? "center" : "nearest";
  find(":scope > .frame", layer.box)?.scrollIntoView({ block: at, inline: at });
}

function describe(box, path) {
  const [first, ...lines] = linesOf(box);
  const paths = [...layers].filter(([, layer]) => layer.box === box).map(([own]) => own);
  const close = create("button", "×");
  close.ariaLabel = "Close";
  close.addEventListener("click", () => (location.hash = encodeURI(box.closest("figure").id)));
  const facts = paths.flatMap((own) => (rows.get(own) ?? []).map((row) => factsOf(row, own === path || paths.length === 1)));
  const others = paths.length > 1 ? [create("p", `One of ${paths.length} that are drawn as this box`)] : [];
  const texts = lines.filter((line) => !rows.has(line.split(" · ")[0])).map((line) => create("p", line));
  panel.replaceChildren(close, create("h2", path), create("p", first.slice(first.indexOf(": ") + 2)), ...others, ...texts, ...facts);
}

function factsOf(row, isOpen) {
  const names = [...row.closest("table").tHead.rows[0].cells].map((cell) => cell.textContent);
  const values = [...row.cells].map((cell) => cell.textContent);
  const list = create("dl", "");
  names.forEach((name, at) => at && values[at] && list.append(create("dt", name), create("dd", values[at])));
  const made = create("details", create("summary", values[0]), list);
  made.open = isOpen;
  return made;
}

function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = [...layers].filter(([path, { detail }]) => words.every((word) => `${path} ${detail}`.toLowerCase().includes(word)));
  const found = all.slice(0, SHOWN).map(([path, { detail }]) => {
    const link = create("a", path, create("small", detail.slice(detail.indexOf(": ") + 2)));
    link.href = `#${encodeURI(path)}`;
    return create("li", link);
  });
  if (all.length !== found.length) found.push(create("li", create("small", `and ${all.length - found.length} more`)));
  hits.replaceChildren(...(found.length ? found : [create("li", create("small", "No layer found"))]));
  hits.hidden = !words.length;
}

let zoom = 1;

function setZoom(value) {
  const factor = Math.min(Math.max(value, 0.1), 4) / zoom;
  const [x, y] = [main.scrollLeft + main.clientWidth / 2, main.scrollTop + main.clientHeight / 2];
  zoom *= factor;
  main.style.setProperty("--zoom", String(zoom));
  main.scrollTo(x * factor - main.clientWidth / 2, y * factor - main.clientHeight / 2);
  zoomTools.children[1].textContent = `${Math.round(zoom * 100)}%`;
}

// Fit the width of the picture, as far as its text stays readable.
function fit() {
  const picture = find("figure.shown > svg");
  if (!picture) return;
  const room = main.clientWidth - 2 * parseFloat(getComputedStyle(picture.parentNode).paddingLeft);
  setZoom(Math.max(Math.min(1, room / picture.viewBox.baseVal.width), READABLE));
  const first = find(".frame", picture)?.getBoundingClientRect();
  if (first) main.scrollTo(first.x + main.scrollLeft + first.width / 2 - main.clientWidth / 2, 0);
}

const showAddress = () => show(decodeURIComponent(location.hash.slice(1)));
addEventListener("hashchange", showAddress);
addEventListener("resize", fit);
document.addEventListener("click", () => (hits.hidden = true));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") hits.hidden ? !panel.hidden && find("button", panel).click() : (hits.hidden = true);
  if (event.target === query) return;
  const act = { "/": () => query.focus(), "+": () => setZoom(zoom * 1.2), "-": () => setZoom(zoom / 1.2), 0: fit }[event.key];
  if (act) event.preventDefault();
  act?.();
});
query.addEventListener("input", search);
query.addEventListener("keydown", (event) => event.key === "Enter" && find("a", hits)?.click());
[() => setZoom(zoom / 1.2), fit, () => setZoom(zoom * 1.2)].forEach((act, at) => {
  zoomTools.children[at].addEventListener("click", act);
});

document.body.classList.add("script");
find("search").hidden = false;
showAddress();
