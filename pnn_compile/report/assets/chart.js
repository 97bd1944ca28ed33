// What the charts share: a drawing of the width of its place, axes, and drawing anew on resize.

const charts = [];

// Draw now and whenever the width of the place changes.
function chart(where, draw) {
  const place = typeof where === "string" ? byId(where) : where;
  charts.push({ place, draw, width: 0 });
}

function drawCharts() {
  for (const each of charts) {
    const width = Math.round(each.place.clientWidth);
    if (!width || width === each.width) continue;
    each.width = width;
    each.draw(each.place, width);
  }
}

function redrawChart(where) {
  const each = charts.find(({ place }) => place === byId(where));
  each.width = 0;
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

// A panel of a pair of charts with its own title.
function panel(where, title) {
  const place = element("div", {});
  byId(where).append(element("div", {}, element("h3", {}, title), place));
  return place;
}
