// Shows the details of a box, and searches all names.

const DETAILS = [
  ["Module", (item) => item.path, "code"],
  ["Node", (item) => item.leaf && item.name.replace(/^:/, ""), "code"],
  ["Source", (item) => item.leaf && item.source, "code"],
  ["Operator", (item) => item.leaf && item.op, "code"],
  ["Shape", (item) => item.leaf && item.shape, "code"],
  ["Nodes", (item) => !item.leaf && item.size],
  ["FLOPs forward", (item) => item.flops && `${count(item.flops)}${stageFlops(item) ? ` (${percent(item.flops / stageFlops(item))} of the stage)` : ""}`],
  ["FLOPs backward", (item) => item.backward && count(item.backward)],
  ["Seconds, measured", (item) => item.seconds && seconds(item.seconds)],
  ["Parameters", (item) => item.parameters && size(item.parameters)],
  ["Writes", (item) => item.bytes && size(item.bytes)],
];

function flowList(title, flows, end) {
  if (!flows.length) return [];
  const limit = 8;
  const links = flows.slice(0, limit).map((edge) => {
    const other = edge[end];
    const go = element("button", { type: "button", class: "link", on: { click: () => reveal(other) } }, shortened(other.path || other.label, 34));
    return element("li", {}, go, ` ${size(edge.bytes)}`);
  });
  const more = flows.length > limit ? [element("li", {}, `and ${flows.length - limit} more`)] : [];
  return [element("dt", {}, title), element("dd", {}, element("ul", { class: "flows" }, ...links, ...more))];
}

function operatorDetails(item) {
  if (item.role === "residual" && plan.interfaces[item.stage - 1].why)
    return [element("dt", {}, "Why the cut is here"), element("dd", {}, sentence(plan.interfaces[item.stage - 1].why))];
  const spec = item.role === "preprocess" || item.role === "coarse" ? plan.stages[item.stage][item.role] : null;
  if (!spec) return [];
  const entries = [element("dt", {}, "Parameters"), element("dd", {}, count(spec.parameters)), element("dt", {}, "Linear"), element("dd", {}, spec.linear ? "yes" : "no")];
  if (spec.why) entries.push(element("dt", {}, "Why"), element("dd", {}, spec.why));
  return entries;
}

function showDetails(item) {
  const pane = byId("details");
  pane.parentElement.classList.toggle("chosen", Boolean(item));
  if (!item) return;
  const rows = DETAILS.map(([name, value, kind]) => [name, value(item), kind]).filter(([, value]) => value);
  const list = rows.flatMap(([name, value, kind]) => [element("dt", {}, name), element("dd", { class: kind || null }, value)]);
  const flows = item.leaf ? [...flowList("Reads", neighbors.get(item.id).reads, "source"), ...flowList("Read by", neighbors.get(item.id).readers, "target")] : [];
  const where = item.lane === undefined ? "" : `, ${lanes[item.lane].name.toLowerCase()}`;
  pane.replaceChildren(
    element("button", { type: "button", class: "close", "aria-label": "Close the details", on: { click: () => choose(null) } }, "×"),
    element("h3", {}, item.label),
    element("p", { class: "role" }, `${ROLES[item.role]}${where}`),
    element("dl", {}, ...list, ...(item.leaf ? operatorDetails(item) : []), ...flows),
  );
  pane.scrollTop = 0;
}

const searchable = [];

function collect(group) {
  for (const child of group.children) {
    searchable.push(child);
    if (!child.leaf) collect(child);
  }
}

const HITS = 40;

// Exact names first, then names that start with the query; modules before nodes, short before long.
function search(words) {
  const query = words.trim().toLowerCase();
  if (!query) return [];
  const matches = [];
  for (const item of searchable) {
    const path = (item.path || "").toLowerCase();
    const name = (item.leaf ? item.name : item.label).toLowerCase();
    const lastName = lastAtom(path);
    const rank = lastName === query || name === query || path === query ? 0 : lastName.startsWith(query) || name.startsWith(query) ? 1 : path.includes(query) || name.includes(query) ? 2 : item.leaf && item.op.toLowerCase().includes(query) ? 3 : 9;
    if (rank < 9) matches.push([rank, item.leaf ? 1 : 0, path.length, item]);
  }
  return matches.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]).map((hit) => hit[3]);
}

function startSearch() {
  for (const lane of lanes) {
    collect(lane.root);
    searchable.push(...lane.sweep);
  }
  searchable.push(...inputs);
  const [field, list] = [byId("search"), byId("hits")];
  let hits = [];
  let at = -1;
  const close = () => {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
  };
  const mark = (to) => {
    at = to;
    [...list.children].forEach((row, place) => row.setAttribute("aria-selected", String(place === at)));
    if (at >= 0 && list.children[at]) {
      field.setAttribute("aria-activedescendant", list.children[at].id);
      list.children[at].scrollIntoView({ block: "nearest" });
    }
  };
  const take = (item) => { close(); reveal(item); };
  const update = () => {
    const all = search(field.value);
    hits = all.slice(0, HITS);
    const row = (item, place) => {
      const where = item.lane === undefined ? "input" : lanes[item.lane].name;
      const kind = item.leaf ? item.op : `${item.size} nodes`;
      const title = item.leaf ? item.path || item.label : item.path && item.path.endsWith(item.label) ? item.path : item.label;
      return element("li", { id: `hit-${place}`, role: "option", "aria-selected": "false", on: { mousedown: (event) => event.preventDefault(), click: () => take(item) } }, shortened(title, 90), element("small", {}, `${kind}, ${where}`));
    };
    const hidden = all.length - hits.length;
    const last = !field.value.trim() ? [] : !all.length ? [element("li", { role: "presentation" }, "nothing found")] : hidden ? [element("li", { role: "presentation" }, element("small", {}, `and ${hidden} more`))] : [];
    list.replaceChildren(...hits.map(row), ...last);
    list.hidden = !list.children.length;
    field.setAttribute("aria-expanded", String(!list.hidden));
    mark(hits.length ? 0 : -1);
  };
  field.addEventListener("input", update);
  field.addEventListener("focus", () => { if (field.value) update(); });
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (hits.length) mark((at + (event.key === "ArrowDown" ? 1 : -1) + hits.length) % hits.length);
    } else if (event.key === "Enter" && !list.hidden && hits[at]) {
      event.preventDefault();
      take(hits[at]);
    } else if (event.key === "Escape") {
      if (list.hidden) field.value = "";
      close();
    }
  });
}
