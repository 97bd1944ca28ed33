// Draws the partition graph, and handles opening, choosing and moving between boxes.

const canvas = byId("canvas");
const drawing = d3.select(canvas).append("svg").attr("role", "tree").attr("aria-label", `Partition graph of ${plan.model}`);
drawing.append("defs").selectAll("marker").data(["", "cut"]).join("marker")
  .attr("id", (kind) => `arrow${kind}`).attr("viewBox", "0 0 8 8").attr("refX", 7).attr("refY", 4)
  .attr("markerWidth", 7).attr("markerHeight", 7).attr("markerUnits", "userSpaceOnUse").attr("orient", "auto")
  .append("path").attr("class", (kind) => `arrow ${kind}`).attr("d", "M0,0L8,4L0,8z");
const layers = Object.fromEntries(["lanes", "under", "boxes", "over"].map((name) => [name, drawing.append("g").attr("class", name)]));

const ROLES = {
  input: "input", preprocess: "guess (preprocessing operator)", fine: "fine stage", residual: "residual",
  coarse: "coarse propagator", correct: "correction", head: "head", output: "output",
};
let picture = null;
let chosen = null;
let scale = 1;

const stageFlops = (item) => (item.role === "fine" || item.role === "head") && item.lane < stageCount ? plan.stages[item.lane].flops : 0;

function costLine(item) {
  const parts = item.leaf ? [item.label === item.op ? "" : item.op] : [`${item.size} nodes`];
  if (item.flops) parts.push(count(item.flops));
  return shortened(parts.filter(Boolean).join(" · "), 27);
}

function itemLines(item) {
  const lines = [item.leaf ? item.path || item.name : item.path && item.path.endsWith(item.label) ? item.path : item.label];
  lines.push(item.leaf ? `${item.op}, ${ROLES[item.role]}` : `${item.size} nodes`);
  if (item.shape) lines.push(item.shape);
  if (item.flops) lines.push(`${count(item.flops)} FLOPs${stageFlops(item) ? `, ${percent(item.flops / stageFlops(item))} of its stage` : ""}`);
  if (item.seconds) lines.push(seconds(item.seconds));
  return lines;
}

const shapesOf = (flow) => [...flow.shapes].filter(Boolean).join(" + ");

function edgeLines({ flow }) {
  const title = flow.from && flow.to ? `${flow.from.label} → ${flow.to.label}` : flow.from ? `${flow.from.label} → outside` : `outside → ${flow.to.label}`;
  const stage = flow.edges?.[0].target.role === "residual" ? flow.edges[0].target.stage : 0;
  const why = stage ? plan.interfaces[stage - 1].why : "";
  return [title, shapesOf(flow), size(flow.bytes), why && sentence(why)];
}

const briefShape = (flow) => {
  const shapes = [...flow.shapes].flatMap((shape) => shape.split(" + ")).filter(Boolean);
  if (shapes.length > 1) return `${shapes.length} tensors`;
  const sizes = shapes.length ? shapes[0].slice(1, shapes[0].indexOf("]")).split(", ") : [];
  return sizes.filter((n) => n !== "B").join("×");
};

function drawLanes() {
  const groups = layers.lanes.selectAll("g.lane").data(picture.lanes).join((enter) => {
    const lane = enter.append("g").attr("class", "lane");
    lane.append("rect").attr("rx", 5);
    lane.append("text").attr("class", "name");
    lane.append("text").attr("class", "sub");
    return lane;
  });
  const flops = ({ lane }) => (lane.head ? plan.head : plan.stages[lane.number]).flops;
  groups.select("rect").attr("x", (d) => d.x).attr("y", (d) => d.start).attr("width", (d) => d.width).attr("height", (d) => d.height);
  groups.select("text.name").attr("x", (d) => d.x + 14).attr("y", (d) => d.start + 20).text((d) => d.lane.name);
  groups.select("text.sub").attr("x", (d) => d.x + d.width - 14).attr("y", (d) => d.start + 20).attr("text-anchor", "end")
    .text((d) => `${count(flops(d))} FLOPs`);
}

function drawEdges() {
  const lines = [...picture.edges, ...outsideLines(picture)];
  const layer = (which, some) => layers[which].selectAll("path.edge").data(some).join("path")
    .attr("class", (d) => `edge ${d.cut ? "cut" : ""}`)
    .attr("d", (d) => (d.inside ? smooth(d.points) : elbow(d.points)))
    .attr("marker-end", (d) => (d.flow.to ? `url(#arrow${d.cut ? "cut" : ""})` : null))
    .call(hoverTip, edgeLines);
  // Lines inside open modules lie above their boxes.
  layer("under", lines.filter((line) => !line.inside));
  layer("over", lines.filter((line) => line.inside));
  layers.over.selectAll("rect.port").data(picture.ports).join("rect").attr("class", "port").attr("rx", 3)
    .attr("x", (d) => d.x).attr("y", (d) => d.y).attr("width", PORT).attr("height", PORT);
  // Beside the place where a state leaves its lane: no line and no arrowhead is there.
  // A state that several nodes read is named once, where it leaves its lane, with its own size.
  const leaving = lines.filter((line) => line.cut && !line.inside && line.label)
    .sort((a, b) => b.flow.bytes - a.flow.bytes);
  const cuts = [...new Map(leaving.map((line) => [`${line.label.x} ${line.label.y}`, line])).values()];
  layers.over.selectAll("text.edge-label").data(cuts).join("text").attr("class", "edge-label").attr("text-anchor", "end")
    .attr("x", (d) => d.label.x).attr("y", (d) => d.label.y).text((d) => `${briefShape(d.flow)}, ${size(d.flow.bytes)}`);
}

function drawBoxes() {
  const boxes = layers.boxes.selectAll("g.node").data(picture.boxes, (d) => d.item.id).join((enter) => {
    const box = enter.append("g");
    for (const kind of ["stack", "box", "share", "tab", "ring"]) box.append("rect").attr("class", kind).attr("rx", kind === "tab" || kind === "share" ? 0 : 4);
    box.append("text").attr("class", "label");
    box.append("text").attr("class", "sub");
    return box;
  }).order();
  boxes.attr("class", ({ item }) => `node role-${item.role} ${item.leaf ? "" : "group"} ${item.open ? "open" : ""} ${item === chosen ? "chosen" : ""}`)
    .attr("transform", (d) => `translate(${d.x},${d.y})`)
    .attr("role", "treeitem").attr("tabindex", -1)
    .attr("data-id", ({ item }) => item.id)
    .attr("aria-level", (d) => d.depth + 1)
    .attr("aria-expanded", ({ item }) => (item.leaf ? null : String(item.open)))
    .attr("aria-selected", ({ item }) => String(item === chosen))
    .attr("aria-label", ({ item }) => [item.label, ...itemLines(item).slice(1), item.lane === undefined ? "" : lanes[item.lane].name].filter(Boolean).join(", "));
  const put = (kind, x, y, width, height) => boxes.select(`rect.${kind}`).attr("x", x).attr("y", y).attr("width", width).attr("height", height);
  put("box", 0, 0, (d) => d.width, (d) => d.height);
  put("ring", -3, -3, (d) => d.width + 6, (d) => d.height + 6);
  put("tab", 0, 0, 4, (d) => (d.item.open ? 0 : d.height));
  put("stack", 4, 4, (d) => (d.item.leaf || d.item.open ? 0 : d.width), (d) => d.height);
  const share = ({ item, width }) => (item.open || !stageFlops(item) ? 0 : Math.min(1, item.flops / stageFlops(item)) * (width - 8));
  put("share", 4, (d) => d.height - 4, share, 4);
  boxes.select("text.label").attr("x", 12).attr("y", 17).text(({ item }) => `${item.leaf ? "" : item.open ? "− " : "+ "}${shortened(item.label, item.leaf ? 23 : 21)}`);
  boxes.select("text.sub").attr("x", 12).attr("y", 31).text(({ item }) => (item.open ? "" : costLine(item)));
  boxes.call(withTip, (d) => itemLines(d.item))
    .on("click", (event, d) => { event.stopPropagation(); choose(d.item); if (!d.item.leaf) toggle(d.item); else focusOn(d.item); })
    .on("keydown", onKey)
    .on("focus", (event, d) => { current(d.item); });
  const first = picture.boxes.find((d) => d.item === chosen) || picture.boxes[0];
  current(first.item);
}

const boxOf = (item) => layers.boxes.selectAll("g.node").filter((d) => d.item === item).node();

// The box that the Tab key reaches.
function current(item) {
  layers.boxes.selectAll("g.node[tabindex='0']").attr("tabindex", -1);
  boxOf(item)?.setAttribute("tabindex", 0);
}

function redraw() {
  picture = layoutAll();
  drawLanes();
  drawEdges();
  drawBoxes();
  zoom(scale);
}

function zoom(to) {
  scale = Math.max(0.05, Math.min(3, to));
  drawing.attr("viewBox", `0 0 ${picture.width} ${picture.height}`).attr("width", picture.width * scale).attr("height", picture.height * scale);
}

// Zoom about the middle, or about the pointer.
function zoomAt(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const [left, top] = [(canvas.scrollLeft + x) / scale, (canvas.scrollTop + y) / scale];
  zoom(scale * factor);
  canvas.scrollTo(left * scale - x, top * scale - y);
}

function show(spot, share = 1) {
  const fits = Math.min((canvas.clientWidth * share) / spot.width, (canvas.clientHeight * share) / spot.height);
  zoom(Math.min(1.2, Math.max(0.35, fits)));
  canvas.scrollTo((spot.x + spot.width / 2) * scale - canvas.clientWidth / 2, spot.y * scale - 20);
}

function fit() {
  const minimum = innerWidth < 860 ? 0.5 : 0.3;
  // All of it, unless a tall picture would become small: the canvas scrolls.
  const high = Math.max(0.6, canvas.clientHeight / picture.height);
  zoom(Math.max(minimum, Math.min(1, canvas.clientWidth / picture.width, high)));
  canvas.scrollTo(0, 0);
}

function toggle(item) {
  const before = picture.spots.get(item);
  const [x, y] = [before.x * scale - canvas.scrollLeft, before.y * scale - canvas.scrollTop];
  item.open = !item.open;
  invalidate(item);
  redraw();
  const after = picture.spots.get(item);
  canvas.scrollTo(after.x * scale - x, after.y * scale - y);
  focusOn(item);
}

function focusOn(item) {
  const box = boxOf(item);
  if (!box) return;
  current(item);
  box.focus({ preventScroll: true });
  const spot = picture.spots.get(item);
  const [left, top] = [spot.x * scale, spot.y * scale];
  const height = Math.min(spot.height * scale, 80);
  if (left < canvas.scrollLeft || left + spot.width * scale > canvas.scrollLeft + canvas.clientWidth) canvas.scrollLeft = left - 30;
  if (top < canvas.scrollTop || top + height > canvas.scrollTop + canvas.clientHeight) canvas.scrollTop = top - 60;
}

// Open all groups around an item, choose it and scroll to it.
function reveal(item) {
  for (const above of ancestors(item).slice(0, -1)) {
    if (above.open) continue;
    above.open = true;
    invalidate(above);
  }
  choose(item, false);
  redraw();
  const spot = picture.spots.get(item);
  zoom(Math.max(scale, 0.8));
  canvas.scrollTo((spot.x + spot.width / 2) * scale - canvas.clientWidth / 2, spot.y * scale - canvas.clientHeight / 3);
  focusOn(item);
}

function choose(item, draw = true) {
  chosen = item;
  const near = new Set(item && item.leaf ? neighbors.get(item.id).reads.concat(neighbors.get(item.id).readers).flatMap((edge) => [visible(edge.source), visible(edge.target)]) : []);
  if (draw) layers.boxes.selectAll("g.node").classed("chosen", (d) => d.item === item).classed("near", (d) => near.has(d.item)).attr("aria-selected", (d) => String(d.item === item));
  showDetails(item);
}

// The nearest box in a direction of the arrow keys.
function nearestBox(spot, key) {
  const [dx, dy] = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[key];
  let best = null;
  for (const other of picture.boxes) {
    const [across, along] = [other.x + other.width / 2 - spot.x - spot.width / 2, other.y - spot.y];
    const distance = dx * across + dy * along;
    const offset = Math.abs(dx ? along : across);
    if (other === spot || distance < 4 || (dx && distance < 0.6 * BOX.width)) continue;
    const cost = distance + 3 * offset;
    if (!best || cost < best.cost) best = { cost, other };
  }
  return best && best.other;
}

function onKey(event, spot) {
  const item = spot.item;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) {
    const next = nearestBox(spot, event.key);
    if (next) { choose(next.item); focusOn(next.item); }
  } else if (event.key === "Enter" || event.key === " ") {
    choose(item);
    if (!item.leaf) toggle(item);
  } else if (event.key === "Escape") {
    const around = item.open ? item : item.parent;
    hideTip();
    if (around && around.parent) { choose(around); toggle(around); }
    else choose(null);
  } else if (event.key === "+" || event.key === "=") zoomAt(1.25);
  else if (event.key === "-") zoomAt(0.8);
  else if (event.key === "0") fit();
  else return;
  event.preventDefault();
  event.stopPropagation();
}

function collapseAll() {
  const close = (group) => {
    group.layout = null;
    for (const child of group.children) if (!child.leaf) { child.open = false; close(child); }
  };
  for (const lane of lanes) close(lane.root);
  if (chosen) choose(visible(chosen), false);
  redraw();
  fit();
}

function startGraph() {
  redraw();
  fit();
  showDetails(null);
  byId("zoom-in").addEventListener("click", () => zoomAt(1.25));
  byId("zoom-out").addEventListener("click", () => zoomAt(0.8));
  byId("fit").addEventListener("click", fit);
  byId("collapse").addEventListener("click", collapseAll);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoomAt(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  const select = byId("lane");
  select.append(element("option", { value: "all" }, "whole graph"), ...lanes.map((lane) => element("option", { value: lane.number }, lane.name)));
  select.addEventListener("change", () => {
    if (select.value === "all") return fit();
    const spot = picture.lanes[Number(select.value)];
    return show({ x: spot.x, y: spot.start, width: spot.width, height: Math.min(spot.height, 700) });
  });
  const shown = [["fine", "fine stage"], ["preprocess", "guess"], ["coarse", "coarse"], ["correct", "residual, correction"], ["head", "head"], ["input", "input, output"]];
  byId("legend").append(...shown.map(([role, text]) => element("li", {}, element("i", { class: role }), text)));
}
