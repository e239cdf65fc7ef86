// The drawing on paper: cut into pieces side by side.

/** @import { Stage } from "./stage.js" */
import { MARGIN } from "./pane.js";
import { html, svg } from "./svg.js";

// The area inside the margins of both A4 and Letter in CSS pixels; the first page also has the heading.
const [PAGE_WIDTH, PAGE_HEIGHT, FIRST_HEIGHT] = [690, 940, 790];
const [LARGEST, READABLE] = [0.8, 0.6];
const GAP = 18;

/**
 * Lay out the drawing for each print, and remove it afterwards.
 * @param {HTMLElement} paper
 * @param {Stage} stage
 */
export function listenToPrints(paper, stage) {
  addEventListener("beforeprint", () => paper.replaceChildren(...pieces(stage)));
  addEventListener("afterprint", () => paper.replaceChildren());
}

/** @param {Stage} stage */
function pieces({ pane, paint: { boxes } }) {
  const { width, height } = pane;
  const zooms = [1, 2, 3, 4].map((count) => Math.min(LARGEST, (PAGE_WIDTH - GAP * (count - 1)) / count / width));
  const long = height * zooms[0] > FIRST_HEIGHT;
  const across = !long ? 1 : Math.max(1, zooms.filter((zoom) => zoom >= READABLE).length);
  const zoom = zooms[across - 1];
  const leaves = boxes.visible().filter((item) => !boxes.of(item).open);
  const spans = leaves.map((item) => boxes.absolute(item)).map(({ y, height: high }) => ({ y, end: y + high }));
  spans.sort((a, b) => a.y - b.y);
  const shown = [];
  let start = -MARGIN;
  for (let count = 0; start < height - MARGIN; count++) {
    const limit = (count < across ? FIRST_HEIGHT : PAGE_HEIGHT) / zoom;
    const end = start + limit >= height - MARGIN ? height - MARGIN : cut(spans, start, start + limit);
    shown.push(html("figure", {}, piece(pane, start, end, zoom)));
    start = end;
  }
  return shown;
}

/**
 * Where to cut: as far down as possible without cutting a box.
 * @param {{y: number, end: number}[]} spans of the boxes, from above
 * @param {number} start
 * @param {number} limit
 */
function cut(spans, start, limit) {
  let end = limit;
  for (const span of [...spans].reverse()) if (span.y < end && span.end > end) end = span.y - 10;
  return end > start ? end : limit;
}

/**
 * @param {import("./pane.js").Pane} pane
 * @param {number} start
 * @param {number} end
 * @param {number} zoom
 */
function piece(pane, start, end, zoom) {
  const part = svg("svg", { viewBox: `${-MARGIN} ${start} ${pane.width} ${end - start}` });
  part.style.width = `${pane.width * zoom}px`;
  part.style.height = `${(end - start) * zoom}px`;
  part.append(svg("use", { href: `#${pane.group.id}` }));
  return part;
}
