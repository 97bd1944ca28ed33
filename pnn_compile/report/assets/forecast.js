// Plots time and speed-up against the number of devices, and marks where more of them stop paying.

const METHOD_NAMES = { chain: "chain", collapsed: "collapsed", ddp: "data parallel" };
const METHOD_ROLES = { chain: "fine", collapsed: "coarse" };
const methodName = (method) => METHOD_NAMES[method] || method.replace("gpipe:", "pipeline, micro-batches ");
const inUnit = (number) => (data.forecast.unit === "seconds" ? seconds(number) : count(number));

function forecastLines(row) {
  return [
    `${row.stages} devices, ${methodName(row.method)}`,
    `${row.speedup.toFixed(2)} times as fast, bound ${row.bound.toFixed(2)}`,
    `step ${inUnit(row.time)}${data.forecast.unit === "seconds" ? "" : " FLOPs"}`,
    `most memory on a device ${size(row.memory)}`,
    row.knee ? "more devices do not pay" : "",
    `limited by ${row.limit}`,
  ];
}

// Draw one chart of all methods.
// value: number of a row; label: of the chart; write: format of the axis; backdrop: reference line.
function drawForecast(value, label, write, backdrop) {
  return (place, width) => {
    const forecast = data.forecast;
    const [left, right, top, bottom] = [52, 92, 14, 250];
    const svg = sheet(place, width, bottom + 44, label);
    const counts = [...new Set(forecast.rows.map((row) => row.stages))].sort((a, b) => a - b);
    const x = d3.scaleLog().base(2).domain([counts[0], counts[counts.length - 1] * 1.0001]).range([left + 8, width - right]);
    const y = d3.scaleLinear().domain([0, d3.max(forecast.rows, value)]).nice().range([bottom, top]);
    const ticks = d3.axisBottom(x).tickValues(counts.filter((n) => Number.isInteger(Math.log2(n)))).tickFormat(String).tickSizeOuter(0);
    svg.append("g").attr("class", "axis").attr("transform", `translate(0,${bottom})`).call(ticks);
    leftAxis(svg, y, left, 5, write, width - left - right);
    svg.append("text").attr("class", "mark-text").attr("x", (left + width - right) / 2).attr("y", bottom + 36).attr("text-anchor", "middle").text("devices N, one stage each");
    const reference = backdrop(svg, x, y, counts);
    if (deviceCount >= counts[0] && deviceCount <= counts[counts.length - 1]) {
      svg.append("line").attr("class", "mark").attr("x1", x(deviceCount)).attr("x2", x(deviceCount)).attr("y1", top).attr("y2", bottom);
      svg.append("text").attr("class", "mark-text").attr("x", x(deviceCount)).attr("y", top - 3).attr("text-anchor", "middle").text("this plan");
    }
    const methods = d3.groups(forecast.rows, (row) => row.method).map(([method, rows]) => ({ method, rows, role: METHOD_ROLES[method] || "input" }));
    const line = d3.line((row) => x(row.stages), (row) => y(value(row)));
    const groups = svg.selectAll("g.method").data(methods).join("g").attr("class", (d) => `method role-${d.role}`);
    groups.append("path").attr("class", (d) => `line ${METHOD_ROLES[d.method] ? "" : "second"}`).attr("d", (d) => line(d.rows));
    // Names right of the chart where lines reach its edge, moved apart where they would overlap.
    const last = (method) => method.rows[method.rows.length - 1];
    const [whole, short] = [true, false].map((reaches) => methods.filter((method) => (last(method).stages === counts[counts.length - 1]) === reaches));
    const ends = whole.map((method) => ({ ...method, y: y(value(last(method))) + 4 })).sort((a, b) => a.y - b.y);
    for (let at = 1; at < ends.length; at++) ends[at].y = Math.max(ends[at].y, ends[at - 1].y + 14);
    svg.selectAll("text.end").data(ends).join("text").attr("class", (d) => `end role-${d.role}`)
      .attr("x", width - right + 10).attr("y", (d) => d.y).text((d) => methodName(d.method));
    const dots = groups.selectAll("circle").data((d) => d.rows).join("circle")
      .attr("class", (row) => `dot ${row.knee ? "knee" : ""}`).attr("r", (row) => (row.knee ? 6 : 3.5)).attr("cx", (row) => x(row.stages)).attr("cy", (row) => y(value(row)))
      .attr("role", "img").attr("aria-label", (row) => forecastLines(row).filter(Boolean).join(", "));
    roving(dots);
    withTip(dots, forecastLines);
    const knee = forecast.rows.find((row) => row.knee);
    const lines = methods.map(({ rows }) => rows.map((row) => [x(row.stages), y(value(row))]));
    const marks = [...lines, reference.points, [[x(deviceCount), top], [x(deviceCount), bottom]]];
    const beside = (kind, text, at) => marks.push(labelBeside(svg, kind, text, at, marks, [left, width - right, top, bottom], x(deviceCount)));
    const spot = (row) => [x(row.stages), y(value(row))];
    if (knee) beside("knee-text", `knee: ${knee.stages}`, spot(knee));
    for (const method of short) beside(`end role-${method.role}`, methodName(method.method), spot(last(method)));
    if (reference.name) beside("mark-text", reference.name, reference.at);
  };
}

// Write a text beside a dot, as near as it is crossed by no line.
// lines: of points; frame: left, right, top and bottom, above which a name stands at `taken`. Returns a line through the text.
function labelBeside(svg, kind, text, [x, y], lines, [left, right, top, bottom], taken) {
  const label = svg.append("text").attr("class", kind).text(text);
  const { width, height } = label.node().getBBox();
  // Around the dot, further and further away; first above it.
  const spots = d3.range(16, 130, 6).flatMap((far) => d3.range(16).map((step) => {
    const angle = ((step % 2 ? -1 : 1) * Math.ceil(step / 2) * Math.PI) / 8;
    return [far * Math.sin(angle) + (Math.sin(angle) * width) / 2 - width / 2, height / 3 - far * Math.cos(angle)];
  }));
  const crossed = ([dx, dy]) => {
    const [x0, x1, y0, y1] = [x + dx - 3, x + dx + width + 3, y + dy - height, y + dy + 3];
    const inside = ([px, py]) => px > x0 && px < x1 && py > y0 && py < y1;
    if (x0 < left || x1 > right || y0 < top - 14 || (y0 < top && Math.abs(x + dx + width / 2 - taken) < width / 2 + 30) || y1 > bottom) return true;
    return lines.some((points) => d3.pairs(points).some(([[ax, ay], [bx, by]]) => d3.range(0, 1.01, 0.02).some((t) => inside([ax + t * (bx - ax), ay + t * (by - ay)]))));
  };
  const [dx, dy] = spots.find((spot) => !crossed(spot)) || spots[0];
  label.attr("x", x + dx).attr("y", y + dy);
  return [[x + dx, y + dy - height / 3], [x + dx + width, y + dy - height / 3]];
}

// Draw a line to compare with; return its points, its name, and where that belongs.
function idealLine(svg, x, y, counts) {
  const top = y.domain()[1];
  const ideal = counts.filter((n) => n <= top).concat(top <= counts[counts.length - 1] ? [top] : []);
  const points = ideal.map((n) => [x(n), y(n)]);
  svg.append("path").attr("class", "line second").attr("d", d3.line()(points));
  return { points, name: ideal.length ? "ideal" : "", at: points[points.length - 1] };
}

function sequentialLine(svg, x, y) {
  const forecast = data.forecast;
  if (forecast.sequential > y.domain()[1]) return { points: [] };
  const points = x.range().map((end) => [end, y(forecast.sequential)]);
  svg.append("path").attr("class", "mark").attr("d", d3.line()(points));
  return { points, name: "one device", at: points[0] };
}

function startForecast() {
  const forecast = data.forecast;
  if (!forecast) {
    const gain = `On ${deviceCount} devices a step takes ${cost(plan.forecast.time)} where the original takes ${cost(plan.forecast.sequential)}: ${plan.forecast.speedup.toFixed(2)} times as fast.`;
    return empty("forecast-chart", `${gain} This command adds a forecast of other numbers of stages:`, "pnn-compile inspect DIR --html report.html");
  }
  byId("forecast-lead").textContent = `${sentence(forecast.verdict)} By ${forecast.unit} of a ${forecast.training ? "training step" : "forward pass"} at the example batch of ${forecast.batch}, ${forecast.devices.length ? `on ${forecast.devices.join(", ")}` : "with free links"}.`;
  chart(panel("forecast-chart", "Speed-up"), drawForecast((row) => row.speedup, "Speed-up against the number of devices", (n) => `${n}×`, idealLine));
  chart(panel("forecast-chart", `Time of a step, ${forecast.unit}`), drawForecast((row) => row.time, "Time of a step against the number of devices", inUnit, sequentialLine));
}
