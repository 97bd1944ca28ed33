// Builds the partition graph: nodes, the tree of modules of each lane, and flows between them.

const texts = data.graph.texts;
const columns = data.graph.nodes;
const COUNTS = { flops: "flops", backward: "backward_flops", parameters: "parameter_bytes", bytes: "bytes" };
const nodes = columns.name.map((name, id) => ({
  id,
  name,
  leaf: true,
  role: texts[columns.role[id]],
  stage: columns.stage[id],
  op: texts[columns.op[id]],
  path: texts[columns.path[id]],
  source: texts[columns.source[id]],
  shape: texts[columns.shape[id]],
  flops: columns.flops[id],
  backward: columns.backward_flops[id],
  parameters: columns.parameter_bytes[id],
  bytes: columns.bytes[id],
  seconds: columns.seconds ? columns.seconds[id] : null,
  size: 1,
  parent: null,
}));

const edges = [];
for (let at = 0; at < data.graph.edges.length; at += 5) {
  const [source, target, bytes, crosses, shape] = data.graph.edges.slice(at, at + 5);
  edges.push({ source: nodes[source], target: nodes[target], bytes, crosses: Boolean(crosses), shape: texts[shape] });
}

const lastAtom = (path) => path.slice(path.lastIndexOf(".") + 1);

// A path relative to a module; one that starts with a number keeps the name before it.
function relative(path, around) {
  const inside = around && path.startsWith(`${around}.`) ? path.slice(around.length + 1) : path;
  return around && /^\d/.test(inside) ? `${lastAtom(around)}.${inside}` : inside;
}

function nodeLabel(node, around) {
  if (node.name.startsWith(":")) return { preprocess: "guess", coarse: "coarse", residual: "residual", correct: "correct", output: "output" }[node.role];
  if (node.role === "input") return node.name;
  if (!node.path || node.path === around) return node.name;
  return relative(node.path, around) || node.name;
}

// The label of the first or last node in a run of neighbors.
function endLabel(item, around, last) {
  if (item.leaf) return nodeLabel(item, around);
  if (item.label) return relative(item.path, around);
  return endLabel(item.children[last ? item.children.length - 1 : 0], around, last);
}

let groupCount = 0;

function makeGroup(label, path, children, lane, role) {
  const group = { id: `g${groupCount++}`, label, path, children, lane, role, leaf: false, open: false, parent: null };
  group.seconds = null;
  group.size = sum(children.map((child) => child.size));
  for (const key of Object.keys(COUNTS)) group[key] = sum(children.map((child) => child[key]));
  if (columns.seconds) group.seconds = sum(children.map((child) => child.seconds || 0));
  for (const child of children) child.parent = group;
  group.links = new Map(); // between children: "source target" to what flows
  group.ins = new Map(); // children that read from outside
  group.outs = new Map(); // children that are read outside
  return group;
}

function grow(tree, lane, role) {
  return tree.map((item) => {
    if (typeof item === "number") return Object.assign(nodes[item], { lane });
    const [label, path, inside] = item;
    return makeGroup(texts[label], texts[path], grow(inside, lane, role), lane, role);
  });
}

function nameRuns(group) {
  for (const child of group.children) {
    if (child.leaf) {
      child.label = nodeLabel(child, group.path);
      continue;
    }
    if (!child.label) {
      const ends = [false, true].map((last) => endLabel(child, group.path, last));
      child.label = ends[0] === ends[1] ? ends[0] : `${ends[0]} … ${ends[1]}`;
    } else if (/^\d/.test(child.label)) child.label = relative(child.path, group.path);
    nameRuns(child);
  }
}

const SWEEP = ["residual", "coarse", "correct"];

// One lane per stage with its guess and modules, then one for the head.
const lanes = data.graph.lanes.map((tree, number) => {
  const head = number === stageCount;
  const guess = nodes.filter((node) => node.role === "preprocess" && node.stage === number && !head);
  const root = makeGroup(head ? "Head" : `Stage ${number}`, "", [...guess, ...grow(tree, number, head ? "head" : "fine")], number, "fine");
  root.open = true;
  const sweep = head ? [] : nodes.filter((node) => SWEEP.includes(node.role) && node.stage === number);
  for (const node of [...sweep, ...guess]) node.lane = number;
  return { number, head, root, sweep, name: root.label };
});
const inputs = nodes.filter((node) => node.role === "input");
const output = nodes.find((node) => node.role === "output");
for (const lane of lanes) nameRuns(lane.root);
for (const node of nodes) node.label ??= nodeLabel(node, "");

function ancestors(item) {
  const path = [item];
  while (path[0].parent) path.unshift(path[0].parent);
  return path;
}

function addFlow(map, key, edge, from, to) {
  const flow = map.get(key);
  if (flow) {
    flow.bytes += edge.bytes;
    flow.shapes.add(edge.shape);
  } else map.set(key, { from, to, bytes: edge.bytes, shapes: new Set([edge.shape]) });
}

const outside = []; // edges between lanes, inputs, sweeps and the output

// Add an edge to every group on the path from its source to its target.
function spread(edge) {
  const [up, down] = [ancestors(edge.source), ancestors(edge.target)];
  let level = 0;
  while (level < up.length && level < down.length && up[level] === down[level]) level += 1;
  if (level) addFlow(up[level - 1].links, `${up[level].id} ${down[level].id}`, edge, up[level], down[level]);
  else outside.push(edge);
  // A separate line leads from a guess to its residual.
  if (edge.source.role !== "preprocess")
    for (let at = level + 1; at < up.length; at++) addFlow(up[at - 1].outs, up[at].id, edge, up[at], null);
  for (let at = level + 1; at < down.length; at++) addFlow(down[at - 1].ins, down[at].id, edge, null, down[at]);
}

for (const edge of edges) spread(edge);

// The box on the screen that shows a node: itself, or the closed module that it is in.
function visible(item) {
  return ancestors(item).find((above) => !above.open) || item;
}

const neighbors = new Map(nodes.map((node) => [node.id, { reads: [], readers: [] }]));
for (const edge of edges) {
  neighbors.get(edge.target.id).reads.push(edge);
  neighbors.get(edge.source.id).readers.push(edge);
}

function leaves(item) {
  return item.leaf ? [item] : item.children.flatMap(leaves);
}
