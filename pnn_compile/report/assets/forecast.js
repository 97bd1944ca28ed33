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
    backdrop(svg, x, y, counts);
    if (deviceCount >= counts[0] && deviceCount <= counts[counts.length - 1]) {
      svg.append("line").attr("class", "mark").attr("x1", x(deviceCount)).attr("x2", x(deviceCount)).attr("y1", top).attr("y2", bottom);
      svg.append("text").attr("class", "mark-text").attr("x", x(deviceCount)).attr("y", top - 3).attr("text-anchor", "middle").text("this plan");
    }
    const methods = d3.groups(forecast.rows, (row) => row.method).map(([method, rows]) => ({ method, rows, role: METHOD_ROLES[method] || "input" }));
    const line = d3.line((row) => x(row.stages), (row) => y(value(row)));
    const groups = svg.selectAll("g.method").data(methods).join("g").attr("class", (d) => `method role-${d.role}`);
    groups.append("path").attr("class", (d) => `line ${METHOD_ROLES[d.method] ? "" : "second"}`).attr("d", (d) => line(d.rows));
    // Names at the ends of the lines, moved apart where they would overlap.
    const ends = methods.map((method) => ({ ...method, y: y(value(method.rows[method.rows.length - 1])) + 4 })).sort((a, b) => a.y - b.y);
    for (let at = 1; at < ends.length; at++) ends[at].y = Math.max(ends[at].y, ends[at - 1].y + 14);
    svg.selectAll("text.end").data(ends).join("text").attr("class", (d) => `end role-${d.role}`)
      .attr("x", (d) => x(d.rows[d.rows.length - 1].stages) + 10).attr("y", (d) => d.y).text((d) => methodName(d.method));
    const dots = groups.selectAll("circle").data((d) => d.rows).join("circle")
      .attr("class", (row) => `dot ${row.knee ? "knee" : ""}`).attr("r", (row) => (row.knee ? 6 : 3.5)).attr("cx", (row) => x(row.stages)).attr("cy", (row) => y(value(row)))
      .attr("role", "img").attr("aria-label", (row) => forecastLines(row).filter(Boolean).join(", "));
    roving(dots);
    withTip(dots, forecastLines);
    const knee = forecast.rows.find((row) => row.knee);
    if (knee) svg.append("text").attr("class", "knee-text").attr("x", x(knee.stages)).attr("y", y(value(knee)) - 11).attr("text-anchor", "end").text(`knee: ${knee.stages}`);
  };
}

function idealLine(svg, x, y, counts) {
  const top = y.domain()[1];
  const ideal = counts.filter((n) => n <= top).concat(top <= counts[counts.length - 1] ? [top] : []);
  svg.append("path").attr("class", "line second").attr("d", d3.line((n) => x(n), (n) => y(n))(ideal));
  if (ideal.length) svg.append("text").attr("class", "mark-text").attr("x", x(ideal[ideal.length - 1]) - 6).attr("y", y(ideal[ideal.length - 1]) + 4).attr("text-anchor", "end").text("ideal");
}

function sequentialLine(svg, x, y) {
  const forecast = data.forecast;
  if (forecast.sequential > y.domain()[1]) return;
  svg.append("line").attr("class", "mark").attr("x1", x.range()[0]).attr("x2", x.range()[1]).attr("y1", y(forecast.sequential)).attr("y2", y(forecast.sequential));
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
