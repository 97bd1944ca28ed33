// Shared by all charts: an SVG as wide as its container, axes, and redrawing on resize.

const charts = [];

// Register a chart; it is drawn again whenever the width of its container changes.
function chart(where, draw) {
  const place = typeof where === "string" ? byId(where) : where;
  charts.push({ place, draw, width: 0 });
}

function drawCharts() {
  for (const item of charts) {
    const width = Math.round(item.place.clientWidth);
    if (!width || width === item.width) continue;
    item.width = width;
    item.draw(item.place, width);
  }
}

function redrawChart(where) {
  const item = charts.find(({ place }) => place === byId(where));
  item.width = 0;
  drawCharts();
}

function sheet(place, width, height, label) {
  place.querySelector("svg")?.remove();
  return d3.select(place).append("svg").attr("viewBox", `0 0 ${width} ${height}`).attr("role", "group").attr("aria-label", label);
}

function bottomAxis(svg, scale, y, ticks, format, grid = 0) {
  const axis = d3.axisBottom(scale).ticks(ticks).tickSizeOuter(0);
  if (format) axis.tickFormat(format);
  if (grid) svg.append("g").attr("class", "grid").attr("transform", `translate(0,${y})`).call(d3.axisBottom(scale).ticks(ticks).tickSize(-grid).tickFormat(""));
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${y})`).call(axis);
}

function leftAxis(svg, scale, x, ticks, format, grid = 0) {
  const axis = d3.axisLeft(scale).ticks(ticks).tickSizeOuter(0);
  if (format) axis.tickFormat(format);
  if (grid) svg.append("g").attr("class", "grid").attr("transform", `translate(${x},0)`).call(d3.axisLeft(scale).ticks(ticks).tickSize(-grid).tickFormat(""));
  svg.append("g").attr("class", "axis").attr("transform", `translate(${x},0)`).call(axis);
}

// One of two charts side by side, with a title.
function panel(where, title) {
  const place = element("div", {});
  byId(where).append(element("div", {}, element("h3", {}, title), place));
  return place;
}
