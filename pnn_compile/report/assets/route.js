// Routes lines between lanes: inputs to lanes, states to residuals, the sweep, and into the head.

const smooth = d3.line((point) => point.x, (point) => point.y).curve(d3.curveBasis);

// A polyline with round corners.
function elbow(points) {
  const path = d3.path();
  path.moveTo(points[0].x, points[0].y);
  for (let at = 1; at < points.length - 1; at++) {
    const [before, corner, after] = [points[at - 1], points[at], points[at + 1]];
    const length = Math.min(Math.hypot(corner.x - before.x, corner.y - before.y), Math.hypot(after.x - corner.x, after.y - corner.y));
    path.arcTo(corner.x, corner.y, after.x, after.y, Math.min(8, length / 2));
  }
  const end = points[points.length - 1];
  path.lineTo(end.x, end.y);
  return path.toString();
}

const bottomOf = (spot) => ({ x: spot.x + spot.width / 2, y: spot.y + spot.height });
const topOf = (spot, shift = 0) => ({ x: spot.x + spot.width / 2 + shift, y: spot.y });
const leftOf = (spot, shift = 0) => ({ x: spot.x, y: spot.y + spot.height / 2 + shift });
const rightOf = (spot, shift = 0) => ({ x: spot.x + spot.width, y: spot.y + spot.height / 2 + shift });

// Where lines leave an item: its box, or the port of its lane if the item is inside of a module.
function exit(picture, item) {
  if (picture.spots.has(item) && !item.parent) return { spot: picture.spots.get(item), isBox: true };
  const port = picture.ports.find((port) => port.name === "out" && port.group === lanes[item.lane].root);
  return { spot: port || picture.spots.get(visible(item)), isBox: false };
}

function entry(picture, item) {
  if (picture.spots.has(item) && !item.parent) return { spot: picture.spots.get(item), isBox: true };
  const port = picture.ports.find((port) => port.name === "in" && port.group === lanes[item.lane].root);
  return { spot: port || picture.spots.get(visible(item)), isBox: false };
}

function guessLine(picture, guess, residual) {
  const [from, to] = [picture.spots.get(guess), picture.spots.get(residual)];
  const x = picture.lanes[guess.lane].x + 7;
  return [leftOf(from), { x, y: leftOf(from).y }, { x, y: to.y + to.height / 2 - 8 }, leftOf(to, -8)];
}

function points(picture, edge) {
  const { source, target } = edge;
  if (source.role === "preprocess" && target.role === "residual") return guessLine(picture, source, target);
  const [from, to] = [exit(picture, source), entry(picture, target)];
  if (source.role === "input") {
    const bus = picture.lanes[0].y - 8;
    const start = bottomOf(from.spot);
    return [start, { x: start.x, y: bus }, { x: topOf(to.spot).x, y: bus }, topOf(to.spot)];
  }
  const lane = (item) => (item.role === "output" ? lanes.length - 1 : item.lane);
  const near = lane(source) === lane(target);
  if (near && to.isBox && target.role === "correct" && !from.isBox) {
    // From the modules of the stage past its residual and coarse network.
    const x = picture.lanes[source.lane].x + picture.lanes[source.lane].width - 7;
    const start = bottomOf(from.spot);
    return [start, { x: start.x, y: start.y + 12 }, { x, y: start.y + 12 }, { x, y: rightOf(to.spot).y - 8 }, rightOf(to.spot, -8)];
  }
  if (near) return [bottomOf(from.spot), topOf(to.spot)];
  const gap = picture.lanes[lane(target)].x - LANE.gap / 2;
  if (from.isBox && to.isBox && Math.abs(from.spot.y - to.spot.y) < 2) return [rightOf(from.spot), leftOf(to.spot)];
  const start = from.isBox ? rightOf(from.spot) : bottomOf(from.spot);
  const out = from.isBox ? [start] : [start, { x: start.x, y: start.y + 12 }];
  if (to.isBox && lane(target) === lane(source) + 1) return [...out, { x: gap, y: out[out.length - 1].y }, { x: gap, y: leftOf(to.spot).y }, leftOf(to.spot)];
  const side = picture.lanes[lane(source)].x + picture.lanes[lane(source)].width + LANE.gap / 2;
  const end = topOf(to.spot, to.isBox ? -24 : 0);
  return [...out, { x: side, y: out[out.length - 1].y }, { x: side, y: end.y - 12 }, { x: end.x, y: end.y - 12 }, end];
}

// Where the shape of a state is written that leaves an item: below its box, or below its line.
function labelSpot(picture, source) {
  const { spot, isBox } = exit(picture, source);
  const lane = picture.lanes[source.lane];
  return lane && spot && { x: lane.x + lane.width - LANE.side, y: spot.y + spot.height + (isBox ? 14 : 25) };
}

// Lines between lanes; edges with the same two ends share one.
function outsideLines(picture) {
  const lines = new Map();
  for (const edge of outside) {
    const ends = [exit(picture, edge.source).spot, entry(picture, edge.target).spot];
    if (!ends[0] || !ends[1]) continue;
    const cut = edge.crosses || (edge.source.role === "correct" && edge.target.lane === lanes.length - 1);
    const key = `${ends.map((spot) => `${spot.x},${spot.y}`).join(" ")} ${cut}`;
    const line = lines.get(key);
    if (line) {
      line.flow.bytes += edge.bytes;
      line.flow.shapes.add(edge.shape);
      line.flow.edges.push(edge);
    } else {
      const flow = { from: edge.source, to: edge.target, bytes: edge.bytes, shapes: new Set([edge.shape]), edges: [edge] };
      lines.set(key, { flow, cut, points: points(picture, edge), label: labelSpot(picture, edge.source) });
    }
  }
  return [...lines.values()];
}
