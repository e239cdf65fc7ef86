// The panel: the data of the selected box, and of each layer that it stands for.

/** @import { Drawing, Item, Row } from "./data.js" */
/** @import { Heatmap } from "./heat.js" */
import { marksOf, skippedIn } from "./data.js";
import { counted, html, withUnit } from "./elements.js";

/** Rows of a fact list: name, value and tooltip.
 * @typedef {[string, string, string?][]} Facts */

export class Panel {
  /**
   * @param {HTMLElement} element
   * @param {Drawing} drawing
   * @param {Heatmap} heatmap
   * @param {(item: Item, path?: string) => void} choose called with the box to select
   */
  constructor(element, drawing, heatmap, choose) {
    this.element = element;
    this.drawing = drawing;
    this.heatmap = heatmap;
    this.choose = choose;
    this.whenClosed = () => {};
    /** @type {Map<string, string>} */
    this.reasons = new Map(drawing.skipped.map(({ path, reason }) => [path, reason]));
  }

  get isOpen() {
    return !this.element.hidden;
  }

  close() {
    if (!this.isOpen) return;
    this.element.hidden = true;
    this.whenClosed();
  }

  /**
   * @param {string} title
   * @param {(Node | string)[]} children
   */
  #open(title, children) {
    const close = html("button", { class: "close", "aria-label": "Close panel", onclick: () => this.close() }, "×");
    this.element.replaceChildren(html("header", {}, html("h2", {}, title), close), ...children);
    this.element.hidden = false;
    this.element.scrollTop = 0;
  }

  /**
   * Show a box.
   * @param {Item} item
   * @param {string} path which of the layers that it stands for
   */
  show(item, path) {
    const marks = item.isScope ? marksOf(item) : item.marks;
    const title = item.count > 1 ? `${item.label} × ${item.count}` : item.label || "model";
    const one = !item.isScope && marks.length ? (marks.includes(path) ? path : marks[0]) : "";
    this.#open(title, [
      ...this.#place(item),
      this.#facts(item, marks),
      ...this.#skipped(item),
      ...trainedInFull(item),
      ...(marks.length > 1 ? this.#means(marks) : []),
      ...(one ? this.#layer(marks, one) : []),
      ...(marks.length > 1 || (item.isScope && marks.length) ? this.#layers(item, marks, one) : []),
      ...this.#paths(item, marks),
    ]);
  }

  /** @param {Item} item */
  #place(item) {
    const { parent } = item;
    if (!parent?.parent) return [];
    const go = () => this.choose(parent);
    return [html("p", { class: "around" }, "in ", html("button", { class: "link", onclick: go }, nameOf(parent)))];
  }

  /**
   * @param {Item} item
   * @param {string[]} marks
   */
  #facts(item, marks) {
    const path = item.isScope || item.kind !== "op" ? item.target : "";
    const several = Math.max(item.paths.length, item.count);
    const parameters = item.isScope ? sum(item.parts) : item.parameters;
    const trained = marks.flatMap((mark) => this.drawing.rows.get(mark) ?? []);
    /** @type {Facts} */
    const facts = [
      ["path", several > 1 ? "" : path],
      ["function", item.kind === "op" ? item.target : ""],
      [item.kind === "op" ? "reads" : "class", item.detail],
      ["reads from", item.ports?.join(", ") ?? ""],
      ["shape", item.shape],
      ["dtype", item.dtype],
      ["traced", item.isScope ? (item.kind === "traced" ? "yes" : "no, in order of definition") : ""],
      ["stands for", several > 1 ? `${several} identical modules` : ""],
      [several > 1 ? "parameters of all" : "parameters", parameters ? parameters.toLocaleString("en") : ""],
      ["adapted layers", item.isScope && marks.length ? String(marks.length) : ""],
      ["adapter parameters", trained.length > 1 ? trainedOf(trained).toLocaleString("en") : ""],
    ];
    if (item.kind === "adapted_layer" && !marks.length)
      facts.push(["adapter", "the same as in the layer's first call"]);
    return list(facts);
  }

  /** @param {Item} item */
  #skipped(item) {
    const paths = item.isScope ? skippedIn(item) : item.skipped;
    if (!paths.length) return [];
    const title = item.isScope ? `${counted(paths.length, "layer")} not adapted` : "Not adapted";
    return [html("section", { class: "not-adapted" }, html("h3", {}, title), ...this.#reasoned(paths))];
  }

  /**
   * Skipped layers by reason.
   * @param {string[]} paths
   */
  #reasoned(paths) {
    /** @type {Map<string, string[]>} */
    const groups = new Map();
    for (const path of paths) {
      const reason = this.reasons.get(path) ?? "";
      groups.set(reason, [...(groups.get(reason) ?? []), path]);
    }
    const items = new Map(this.drawing.skipped.map(({ path, item }) => [path, item]));
    return [...groups].flatMap(([reason, group]) => {
      const buttons = group.map((path) => {
        const go = () => this.choose(/** @type {Item} */ (items.get(path)), path);
        return html("li", {}, html("button", { class: "link", onclick: go }, path));
      });
      return [html("p", { class: "reason" }, reason), html("ul", {}, ...buttons)];
    });
  }

  /** The skipped layers of the whole drawing. */
  showSkipped() {
    const paths = this.drawing.skipped.map(({ path }) => path);
    const words = "These layers could have an adapter, but do not have one.";
    const reasons = html("section", { class: "not-adapted" }, html("p", {}, words), ...this.#reasoned(paths));
    this.#open(`${counted(paths.length, "layer")} not adapted`, [reasons]);
  }

  /**
   * The means over the layers in a box, one of which is in the box.
   * @param {string[]} marks
   */
  #means(marks) {
    const { heatmap } = this;
    /** @type {Facts} */
    const facts = [...this.drawing.heats.values()].map((heat) => [
      heat.words,
      heatmap.text(heatmap.mean(marks, heat) ?? Number.NaN, heat),
    ]);
    return [html("section", { class: "means" }, html("h3", {}, `Mean of ${marks.length} layers`), list(facts))];
  }

  /**
   * The rows of the report for one layer.
   * @param {string[]} marks the layers that the box stands for
   * @param {string} path
   */
  #layer(marks, path) {
    const rows = this.drawing.rows.get(path) ?? [];
    const sections = rows.map((row) => {
      const name = rows.length > 1 || row.adapter !== "default" ? `Adapter ${row.adapter}` : "Adapter";
      const title = html("h3", {}, row.active ? name : `${name}, inactive`);
      const chart = row.angles.length ? [spectrum(row.angles)] : [];
      return html("section", { class: "adapter" }, title, list(adapterFacts(row)), ...chart);
    });
    if (marks.length < 2) return sections;
    const which = html("p", { class: "which" }, `Layer ${marks.indexOf(path) + 1} of ${marks.length}`);
    return [which, html("h3", { class: "instance" }, path), ...sections];
  }

  /**
   * A table of the layers in a box.
   * @param {Item} item
   * @param {string[]} marks
   * @param {string} chosen
   */
  #layers(item, marks, chosen) {
    const rows = marks.flatMap((mark) => this.drawing.rows.get(mark) ?? []);
    const several = new Set(rows.map((row) => row.adapter)).size > 1;
    const named = ["layer", ...(several ? ["adapter"] : []), "r", "change", "mean", "largest"];
    const head = html("tr", {}, ...named.map((name) => html("th", { scope: "col" }, name)));
    const body = rows.map((row) => {
      const tint = html("i", { class: "tint", "aria-hidden": "true" });
      const value = this.heatmap.mean([row.path]);
      tint.style.background = value === undefined ? "" : this.heatmap.colors(value).fill;
      const go = () => this.choose(item.isScope ? this.#holder(row.path) : item, row.path);
      const name = html("th", { scope: "row" }, tint, html("button", { class: "link", onclick: go }, row.path));
      const cells = [...(several ? [row.adapter] : []), String(row.r), percent(row.weight_change)];
      const values = [...cells, degrees(row.mean_angle), degrees(row.angle)].map((text) => html("td", {}, text));
      return html("tr", row.path === chosen ? { "aria-current": "true" } : {}, name, ...values);
    });
    const table = html("table", {}, html("thead", {}, head), html("tbody", {}, ...body));
    const title = item.isScope ? "Adapted layers" : `All ${marks.length} layers`;
    return [html("section", {}, html("h3", {}, title), html("div", { class: "wide" }, table))];
  }

  /**
   * @param {string} path
   * @returns {Item}
   */
  #holder(path) {
    return /** @type {Item} */ (this.drawing.items.find((item) => !item.isScope && item.marks.includes(path)));
  }

  /**
   * The modules that a box stands for, if no other section lists them.
   * @param {Item} item
   * @param {string[]} marks
   */
  #paths(item, marks) {
    if (item.paths.length < 2 || (!item.isScope && marks.length > 1) || item.skipped.length) return [];
    const lines = item.paths.map((path) => html("li", {}, path));
    return [html("section", {}, html("h3", {}, "Modules"), html("ul", { class: "plain" }, ...lines))];
  }
}

/**
 * The report's values of one adapter at one layer.
 * @param {Row} row
 * @returns {Facts}
 */
function adapterFacts(row) {
  return [
    ["d", String(row.d)],
    ["r", String(row.r)],
    ["parameters", row.parameters.toLocaleString("en")],
    ["weight change", percent(row.weight_change), `|WQ - W| / |W| = ${row.weight_change}`],
    ["mean angle", degrees(row.mean_angle), `${row.mean_angle} radians`],
    ["largest angle", degrees(row.angle), `${row.angle} radians`],
    ["|Q - I|", row.rotation.toFixed(3), String(row.rotation)],
    ["share of the weight", percent(row.share), String(row.share)],
    ["|QᵀQ - I|", row.orthogonality.toExponential(0), String(row.orthogonality)],
  ];
}

/** @param {Item} item */
function trainedInFull(item) {
  if (!item.trained.length) return [];
  const lines = item.trained.map((path) => html("li", {}, path));
  return [html("section", {}, html("h3", {}, "Trained in full"), html("ul", { class: "plain" }, ...lines))];
}

/** @param {Facts} facts */
function list(facts) {
  const shown = facts.filter(([, value]) => value);
  return html(
    "dl",
    {},
    ...shown.map(([name, value, exact]) =>
      html("div", {}, html("dt", {}, name), html("dd", exact ? { title: exact } : {}, value)),
    ),
  );
}

/**
 * The path of a scope, or its name if it stands for several modules.
 * @param {Item} item
 */
function nameOf(item) {
  return item.paths.length > 1 ? `${item.label} (× ${item.paths.length})` : item.target || item.label;
}

/** @param {number} radians */
function degrees(radians) {
  return withUnit((radians * 180) / Math.PI, "°");
}

/** @param {number} share */
function percent(share) {
  return withUnit(100 * share, "%");
}

/** @param {Row[]} rows */
function trainedOf(rows) {
  return rows.reduce((total, row) => total + row.parameters, 0);
}

/**
 * @param {Item[]} items
 * @returns {number}
 */
function sum(items) {
  return items.reduce((total, item) => total + (item.isScope ? sum(item.parts) : item.parameters), 0);
}

/**
 * One bar for each plane, in degrees, the largest first.
 * @param {number[]} angles in radians
 */
function spectrum(angles) {
  const degrees = angles.map((angle) => (angle * 180) / Math.PI);
  const top = Math.max(...degrees.filter((angle) => angle > 0), 1e-9);
  const bars = degrees.map((angle, index) => {
    const style = `height: ${Number.isNaN(angle) ? 0 : (100 * angle) / top}%`;
    return html("i", { style, title: `plane ${index + 1}: ${angle.toFixed(2)}°` });
  });
  const label = `Angles: ${degrees.map((angle) => `${angle.toFixed(1)}°`).join(", ")}`;
  const words = `Angle of each plane, at most ${withUnit(degrees[0], "°")}`;
  const chart = html("div", { class: "spectrum", role: "img", "aria-label": label }, ...bars);
  return html("figure", {}, html("figcaption", {}, words), chart);
}
