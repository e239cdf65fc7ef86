// The rotation angles of a layer's planes as bars.

import { html, svg } from "./elements.js";

const [WIDTH, HEIGHT] = [300, 92];
const [LEFT, TOP, BOTTOM] = [34, 8, 18];
const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 45, 90, 180];

/**
 * One bar for each plane, in degrees, the largest first.
 * @param {number[]} angles in radians
 */
export function spectrum(angles) {
  const degrees = angles.map((angle) => (angle * 180) / Math.PI);
  const largest = Math.max(...degrees, 0);
  const top = STEPS.find((step) => step >= largest * (1 - 1e-6)) ?? 180;
  const base = HEIGHT - BOTTOM;
  const chart = svg("svg", { class: "spectrum", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  chart.setAttribute("aria-label", `Angles: ${degrees.map((angle) => `${angle.toFixed(1)}°`).join(", ")}`);
  for (const share of [0, 0.5, 1]) {
    const y = base - share * (base - TOP);
    chart.append(svg("path", { class: "rule", d: `M${LEFT} ${y}H${WIDTH}` }));
    chart.append(svg("text", { x: LEFT - 5, y: y + 3.5, "text-anchor": "end" }, `${trim(share * top)}°`));
  }
  const step = (WIDTH - LEFT) / degrees.length;
  const wide = Math.min(step - (step > 4 ? 2 : 0.3), 26);
  degrees.forEach((angle, index) => {
    const height = Number.isNaN(angle) ? 0 : (angle / top) * (base - TOP);
    const bar = svg("rect", { class: "bar", height });
    bar.setAttribute("x", (LEFT + index * step + (step - wide) / 2).toFixed(2));
    bar.setAttribute("y", (base - height).toFixed(2));
    bar.setAttribute("width", wide.toFixed(2));
    bar.append(svg("title", {}, `plane ${index + 1}: ${angle.toFixed(2)}°`));
    chart.append(bar);
  });
  const words = degrees.length === 1 ? "1 plane" : `planes 1 to ${degrees.length}, largest angle first`;
  chart.append(svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, words));
  return html("figure", {}, html("figcaption", {}, "Angle by plane"), chart);
}

/** @param {number} value */
function trim(value) {
  return String(Number(value.toPrecision(3)));
}
