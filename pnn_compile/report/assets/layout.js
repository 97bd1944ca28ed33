// Lays out the boxes: dagre arranges the contents of every open module, lanes stand side by side.

const BOX = { width: 172, height: 40 };
const PAD = { side: 12, top: 26, bottom: 10 };
const PORT = 6;
const LANE = { gap: 56, top: 44, side: 14 };
const ROW = 58;

// Arrange an open group, its open groups first; positions of children are relative to the group.
function arrange(group) {
  if (group.layout) return group.layout;
  const drawing = new dagre.graphlib.Graph();
  drawing.setGraph({ rankdir: "TB", ranksep: 22, nodesep: 16, marginx: 0, marginy: 0 });
  drawing.setDefaultEdgeLabel(() => ({}));
  for (const child of group.children) {
    const inside = child.open ? arrange(child) : BOX;
    drawing.setNode(String(child.id), { width: inside.width, height: inside.height });
  }
  const ports = [["in", group.ins], ["out", group.outs]].filter(([, flows]) => flows.size);
  for (const [name] of ports) drawing.setNode(name, { width: PORT, height: PORT });
  const flows = [...group.links.values()];
  for (const [name, ends] of ports)
    for (const flow of ends.values()) flows.push(name === "in" ? { ...flow, from: null } : { ...flow, to: null });
  for (const flow of flows) drawing.setEdge(flow.from ? String(flow.from.id) : "in", flow.to ? String(flow.to.id) : "out");
  dagre.layout(drawing);
  const box = drawing.graph();
  // dagre draws some lines outside of its bounding box.
  const xs = drawing.edges().flatMap((edge) => drawing.edge(edge).points.map((point) => point.x));
  const left = Math.min(0, ...xs);
  const width = Math.max(box.width, ...xs) - left;
  const place = (id) => {
    const at = drawing.node(id);
    return { x: at.x - at.width / 2 + PAD.side - left, y: at.y - at.height / 2 + PAD.top, width: at.width, height: at.height };
  };
  group.layout = {
    width: Math.max(width, BOX.width) + 2 * PAD.side,
    height: box.height + PAD.top + PAD.bottom,
    shift: Math.max(0, (BOX.width - width) / 2),
    children: group.children.map((child) => ({ item: child, ...place(String(child.id)) })),
    ports: ports.map(([name]) => ({ name, ...place(name) })),
    edges: flows.map((flow) => {
      const { points } = drawing.edge(flow.from ? String(flow.from.id) : "in", flow.to ? String(flow.to.id) : "out");
      return { flow, points: points.map(({ x, y }) => ({ x: x + PAD.side - left, y: y + PAD.top })) };
    }),
  };
  return group.layout;
}

// Discard the layout of a group and of all groups around it.
function invalidate(group) {
  for (let at = group; at; at = at.parent) at.layout = null;
}

// Positions of all boxes, ports and edges inside a group whose corner is at x, y.
function flatten(group, x, y, depth, into) {
  const layout = arrange(group);
  const shift = x + layout.shift;
  for (const { item, ...box } of layout.children) {
    const spot = { item, x: shift + box.x, y: y + box.y, width: box.width, height: box.height, depth };
    into.boxes.push(spot);
    into.spots.set(item, spot);
    if (item.open) flatten(item, spot.x, spot.y, depth + 1, into);
  }
  for (const port of layout.ports) into.ports.push({ ...port, group, x: shift + port.x, y: y + port.y });
  for (const { flow, points } of layout.edges)
    into.edges.push({ flow, inside: true, points: points.map((point) => ({ x: point.x + shift, y: point.y + y })) });
}

// Rows of the sweep: in a chain every stage waits for the correction of the previous one.
function sweepRows(base) {
  const rows = new Map();
  const sweeping = lanes.flatMap((lane) => lane.sweep);
  const before = (node) => neighbors.get(node.id).reads.filter((edge) => rows.has(edge.source)).map((edge) => rows.get(edge.source) + (edge.crosses && node.role === "residual" ? 0 : ROW));
  const order = [...sweeping].sort((a, b) => a.stage - b.stage || SWEEP.indexOf(a.role) - SWEEP.indexOf(b.role));
  for (const node of order.filter((node) => node.role !== "correct" || plan.sweep === "chain")) rows.set(node, Math.max(base, ...before(node)));
  for (const node of order.filter((node) => !rows.has(node))) rows.set(node, Math.max(base, ...before(node)));
  return rows;
}

function layoutAll() {
  const into = { boxes: [], ports: [], edges: [], spots: new Map(), lanes: [] };
  const top = inputs.length ? 66 : 10;
  let x = 10;
  for (const lane of lanes) {
    const { width, height } = arrange(lane.root);
    into.lanes.push({ lane, x, y: top, width: width + 2 * LANE.side, upper: top + LANE.top + height });
    x += width + 2 * LANE.side + LANE.gap;
  }
  const right = x - LANE.gap;
  const base = Math.max(...into.lanes.filter((spot) => !spot.lane.head).map((spot) => spot.upper)) + 30;
  const rows = sweepRows(base);
  const lowest = rows.size ? Math.max(...rows.values()) : base;
  const place = (item, x, y) => {
    const spot = { item, x, y, ...BOX, depth: 0 };
    into.boxes.push(spot);
    into.spots.set(item, spot);
  };
  inputs.forEach((node, at) => place(node, 10 + LANE.side + PAD.side + at * (BOX.width + 16), 10));
  for (const spot of into.lanes) {
    const start = spot.lane.head ? lowest - LANE.top : top;
    spot.start = spot.lane.head ? start : top;
    flatten(spot.lane.root, spot.x + LANE.side, start + LANE.top - PAD.top + 8, 0, into);
    for (const node of spot.lane.sweep) {
      const place = { item: node, x: spot.x + (spot.width - BOX.width) / 2, y: rows.get(node), ...BOX, depth: 0 };
      into.boxes.push(place);
      into.spots.set(node, place);
    }
  }
  const headSpot = into.lanes[into.lanes.length - 1];
  const headHeight = arrange(headSpot.lane.root).height;
  const outputY = headSpot.start + LANE.top + (headSpot.lane.root.children.length ? headHeight : 0) + 16;
  place(output, headSpot.x + (headSpot.width - BOX.width) / 2, outputY);
  const bottom = Math.max(outputY + BOX.height, lowest + BOX.height, base);
  for (const spot of into.lanes) spot.height = bottom + 14 - spot.start;
  into.width = Math.max(right, 10 + inputs.length * (BOX.width + 16) + 40) + 10;
  into.height = bottom + 24;
  return into;
}
