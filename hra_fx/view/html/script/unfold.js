// Opening modules inside a picture: the boxes and edges around a module make room for its inside.

/** @typedef {{x: number, y: number, wide: number, high: number}} Place */
/** A vertical part of an edge: its x, and the y of its ends. Curves join the parts.
 * @typedef {[number, number, number]} Piece */

/**
 * Replace the box of a closed module by the drawing of its inside.
 * @param {SVGGElement} closed
 * @param {SVGGElement} inside
 */
export function unfold(closed, inside) {
  const { index } = closed.dataset;
  const [before, made] = [placeOf(closed), placeOf(inside)];
  const [enter, [leave]] = [numbers(inside.dataset.enter), numbers(inside.dataset.leave)];
  move(inside, before.x - made.x, before.y - made.y);
  closed.replaceWith(inside);
  for (const line of partsOf(inside.parentNode, `.shape[data-ends="${index}"]`)) {
    add(line, { x: leave - before.wide / 2 });
  }
  for (const edge of partsOf(inside.parentNode, ".edge")) {
    const { source, target } = endsOf(edge);
    const pieces = piecesOf(edge);
    if (source === index) pieces[0][0] = before.x + leave;
    const last = pieces[pieces.length - 1];
    const aside = enter.length > 1 ? 0 : last[0] - before.x - before.wide / 2;
    // In front of a closed module, edges to all of its ports are one edge.
    for (const port of target === index ? numbers(edge.dataset.ports) : []) {
      last[0] = before.x + enter[port] + aside;
      edge.before(drawn(/** @type {SVGGElement} */ (edge.cloneNode()), pieces));
    }
    if (target === index) edge.remove();
    else drawn(edge, pieces);
  }
  makeRoom(inside, made.wide - before.wide, made.high - before.high, 0);
}

/**
 * Move what is around a box that has grown to the right and down, in all modules around it.
 * @param {SVGGElement} box
 * @param {number} wide by how much it is wider now
 * @param {number} high
 * @param {number} inward how far the ends of its edges have moved
 */
function makeRoom(box, wide, high, inward) {
  const scope = /** @type {SVGGElement} */ (/** @type {Node} */ (box.parentNode));
  const edges = partsOf(scope, ".edge");
  const places = new Map(partsOf(scope, "g").map((group) => [group.dataset.index, placeOf(group)]));
  const own = /** @type {Place} */ (places.get(box.dataset.index));
  own.wide -= wide; // as it was
  own.high -= high;
  const [center, middle] = [own.x + own.wide / 2, own.y + own.high / 2];
  const row = [...places.values()].filter(({ y, high }) => Math.abs(y + high / 2 - middle) < 1);
  const down = Math.max(0, own.high + high - Math.max(...row.map(({ high }) => high)));
  const fall = (/** @type {number} */ y) => (y < middle ? 0 : down);

  // How far the row, with the edges that pass it, gets out of what there is.
  const lanes = edges.flatMap((edge) => piecesOf(edge).slice(1, -1));
  const passes = (/** @type {Piece} */ [, from, to]) => from < middle && to > middle;
  const sides = (/** @type {Iterable<Place>} */ of) => [...of].flatMap(({ x, wide }) => [x, x + wide]);
  const inRow = [...sides(row), ...lanes.filter(passes).map(([x]) => x)];
  const all = [...sides(places.values()), ...lanes.map(([x]) => x)];
  const left = Math.max(0, Math.min(...all) - Math.min(...inRow) + wide / 2);
  const right = Math.max(0, Math.max(...inRow) + wide / 2 - Math.max(...all));
  const aside = (/** @type {number} */ x) => left + (x < center ? -wide / 2 : wide / 2);

  /** By how much the ends of edges at a box move: to the right, and down at its top and its bottom. */
  const shifts = new Map(
    [...places].map(([index, place]) => {
      if (place === own) return [index, [left - wide / 2 + inward, (down - high) / 2, (down + high) / 2]];
      if (row.includes(place)) return [index, [aside(place.x), down / 2, down / 2]];
      return [index, [left, fall(place.y), fall(place.y)]];
    }),
  );
  for (const edge of edges) {
    const { source, target } = endsOf(edge);
    const [from, to, pieces] = [shifts.get(source), shifts.get(target), piecesOf(edge)];
    const moved = pieces.map((piece, at) => {
      const [x, top, bottom] = piece;
      if (from && at === 0) return /** @type {Piece} */ ([x + from[0], top + from[2], bottom + fall(bottom)]);
      if (to && at === pieces.length - 1) return /** @type {Piece} */ ([x + to[0], top + fall(top), bottom + to[1]]);
      const isLane = at > 0 && at < pieces.length - 1 && passes(piece);
      return /** @type {Piece} */ ([x + (isLane ? aside(x) : left), top + fall(top), bottom + fall(bottom)]);
    });
    drawn(edge, moved);
  }
  for (const line of partsOf(scope, ".shape")) {
    const [x, , y] = shifts.get(line.dataset.ends) ?? [0, 0, 0];
    add(line, { x, y });
  }
  for (const group of partsOf(scope, "g")) {
    const [x, y] = shifts.get(group.dataset.index) ?? [0, 0];
    move(group, group === box ? x - inward : x, y);
  }
  for (const port of partsOf(scope, ".entry")) add(port, { x: left });
  for (const part of partsOf(scope, ".badge")) add(part, { x: left + right });
  const [frame] = partsOf(scope, ".frame");
  if (frame) {
    add(frame, { width: left + right, height: down });
    makeRoom(scope, left + right, down, left);
  } else {
    const picture = /** @type {SVGSVGElement} */ (scope.ownerSVGElement);
    const { width, height } = picture.viewBox.baseVal;
    picture.setAttribute("viewBox", `0 0 ${width + left + right} ${height + down}`);
  }
}

/**
 * @param {Node | null} scope
 * @param {string} selector
 */
function partsOf(scope, selector) {
  const found = /** @type {SVGGElement} */ (scope).querySelectorAll(`:scope > ${selector}`);
  return /** @type {SVGGElement[]} */ ([...found]);
}

/**
 * The boxes that an edge leaves and enters; the others are ports, or the lower border.
 * @param {SVGElement} edge
 */
function endsOf(edge) {
  const ends = (edge.dataset.ends ?? "").split(" ");
  const target = edge.hasAttribute("marker-end") ? ends.pop() : undefined;
  return { source: ends[0], target };
}

/** @param {SVGElement} edge */
function piecesOf(edge) {
  /** @type {Piece[]} */
  const pieces = [];
  for (const [, letter, places] of (edge.getAttribute("d") ?? "").matchAll(/([MVC])([^MVC]*)/g)) {
    const [x, y] = numbers(places).slice(-2);
    if (letter === "V") pieces[pieces.length - 1][2] = x;
    else pieces.push([x, y, y]);
  }
  return pieces;
}

/**
 * Draw an edge, as `path_of` of hra_fx/view/svg.py.
 * @param {SVGGElement} edge
 * @param {Piece[]} pieces
 */
function drawn(edge, pieces) {
  const words = pieces.map(([x, from, to], at) => {
    const [before, , end] = pieces[at - 1] ?? [];
    const bend = (end + from) / 2;
    return (at ? `C${before} ${bend} ${x} ${bend} ${x} ${from}` : `M${x} ${from}`) + (to === from ? "" : `V${to}`);
  });
  edge.setAttribute("d", words.join(""));
  return edge;
}

/** @param {string | undefined} text */
function numbers(text) {
  return (text ?? "").split(" ").map(Number);
}

/**
 * The place of a box in the scope around it.
 * @param {SVGGElement} group
 * @returns {Place}
 */
function placeOf(group) {
  const [frame] = partsOf(group, ".frame");
  const [x, y, wide, high] = ["x", "y", "width", "height"].map((name) => Number(frame.getAttribute(name)));
  const { e, f } = group.transform.baseVal.consolidate()?.matrix ?? { e: 0, f: 0 };
  return { x: x + e, y: y + f, wide, high };
}

/**
 * @param {SVGGElement} group
 * @param {number} x
 * @param {number} y
 */
function move(group, x, y) {
  const { e, f } = group.transform.baseVal.consolidate()?.matrix ?? { e: 0, f: 0 };
  group.setAttribute("transform", `translate(${e + x} ${f + y})`);
}

/**
 * Add numbers to attributes.
 * @param {SVGElement} element
 * @param {Record<string, number>} amounts
 */
function add(element, amounts) {
  for (const [name, amount] of Object.entries(amounts)) {
    element.setAttribute(name, String(Number(element.getAttribute(name)) + amount));
  }
}
