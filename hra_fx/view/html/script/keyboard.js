// The keys of the page, and moving between boxes with the arrow keys.

/** @import { Item } from "./data.js" */
/** @import { Stage } from "./stage.js" */

const HEADER = 27; // height of the title of an open module

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

/**
 * @typedef {object} Commands
 * @property {(item: Item) => void} select
 * @property {(item: Item) => void} open
 * @property {() => void} back
 * @property {() => void} search
 * @property {() => void} help
 * @property {() => void} escape
 * @property {(steps: number) => void} zoom
 * @property {() => void} fit
 */

/**
 * Listen to the keys of the page.
 * @param {Stage} stage
 * @param {Commands} commands
 */
export function listenToKeys(stage, commands) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      commands.escape();
      return;
    }
    const target = /** @type {Element} */ (event.target);
    if (target.closest("input, select, dialog")) return;
    const onBoxes = target === document.body || target.closest(".scroller");
    if (onBoxes ? pressed(event.key, stage, commands) : common(event.key, commands)) event.preventDefault();
  });
}

/**
 * @param {string} key
 * @param {Stage} stage
 * @param {Commands} commands
 */
function pressed(key, stage, commands) {
  const { selected } = stage;
  if (key in ARROWS) {
    const next = selected ? neighbor(stage, selected, ARROWS[key]) : stage.boxes[0];
    if (next) commands.select(next);
    return true;
  }
  if ((key === "Enter" || key === " ") && selected) {
    commands.open(selected);
    return true;
  }
  if (key === "Backspace") {
    commands.back();
    return true;
  }
  if (key === "Home" && stage.boxes.length) {
    commands.select(stage.boxes[0]);
    return true;
  }
  return common(key, commands);
}

/**
 * @param {string} key
 * @param {Commands} commands
 */
function common(key, commands) {
  /** @type {Record<string, () => void>} */
  const keys = {
    "/": commands.search,
    "?": commands.help,
    "+": () => commands.zoom(1),
    "=": () => commands.zoom(1),
    "-": () => commands.zoom(-1),
    0: commands.fit,
  };
  if (!(key in keys)) return false;
  keys[key]();
  return true;
}

/**
 * The nearest box in a direction. An open module counts as its title.
 * @param {Stage} stage
 * @param {Item} from
 * @param {[number, number]} direction
 * @returns {Item | null}
 */
function neighbor(stage, from, [right, down]) {
  const here = target(stage, from);
  /** @type {Item | null} */
  let best = null;
  let least = Infinity;
  for (const item of stage.boxes) {
    if (item === from) continue;
    const there = target(stage, item);
    const along = right
      ? gap(here.x, here.width, there.x, there.width, right)
      : gap(here.y, here.height, there.y, there.height, down);
    if (along < 0) continue;
    const across = right
      ? apart(here.y, here.height, there.y, there.height)
      : apart(here.x, here.width, there.x, there.width);
    const middle = right
      ? Math.abs(here.y + here.height / 2 - there.y - there.height / 2)
      : Math.abs(here.x + here.width / 2 - there.x - there.width / 2);
    const cost = along + 3 * across + 0.01 * middle + (right && across > 0 ? 1e6 : 0);
    if (cost < least) [best, least] = [item, cost];
  }
  return best;
}

/**
 * @param {Stage} stage
 * @param {Item} item
 */
function target(stage, item) {
  const place = stage.place(item);
  return item.isScope && !stage.opens(item) ? { ...place, height: HEADER } : place;
}

/**
 * The distance from the end of one range to the start of another in a direction; negative if they overlap.
 * @param {number} start
 * @param {number} size
 * @param {number} other
 * @param {number} otherSize
 * @param {number} sign
 */
function gap(start, size, other, otherSize, sign) {
  return sign > 0 ? other - start - size + 1 : start - other - otherSize + 1;
}

/**
 * The distance of two ranges; 0 if they overlap.
 * @param {number} start
 * @param {number} size
 * @param {number} other
 * @param {number} otherSize
 */
function apart(start, size, other, otherSize) {
  return Math.max(0, other - start - size, start - other - otherSize);
}
