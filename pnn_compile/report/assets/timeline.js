// Plots the simulated timeline of one step: what every rank computes when.

const ROLE_OF = {
  guess: "preprocess", fine: "fine", predict: "coarse", correct: "coarse", head: "head", "head backward": "head",
  "coarse backward": "coarse", "fine backward": "fine", "guess backward": "preprocess",
};
const SPAN_NAMES = { predict: "prediction", correct: "correction", "coarse backward": "correction backward" };

function spanLines(span, step) {
  const [rank, kind, stage, batch, iteration, start, end, critical] = span;
  const iterationText = plan.iterations > 1 ? `, iteration ${iteration + 1}` : "";
  return [
    `${SPAN_NAMES[kind] || kind}${kind === "head" || kind === "head backward" ? "" : ` of stage ${stage}`}`,
    `rank ${rank}, micro-batch ${batch}${iterationText}`,
    `${cost(end - start)}, from ${shortCost(start)} to ${shortCost(end)}`,
    critical ? "on the critical path" : "",
    `${percent((end - start) / step.time)} of the step`,
  ];
}

function drawTimeline(place, width) {
  const { forward, backward, steps } = data.timeline;
  const step = steps[Number(byId("batches").value)];
  const batches = step.batches;
  const single = forward + backward;
  const [left, right, top, row] = [76, 16, 8, deviceCount > 16 ? 13 : 26];
  const rankTop = top + row + 16;
  const bottom = rankTop + deviceCount * row;
  const svg = sheet(place, width, bottom + 34, "Timeline of one step by rank");
  const longest = Math.max(step.time, batches * single);
  const x = d3.scaleLinear().domain([0, longest]).range([left, width - right]);
  bottomAxis(svg, x, bottom + 6, Math.max(2, Math.floor(width / 130)), shortCost, bottom + 6 - top);
  const name = (text, y) => svg.append("text").attr("class", "row-name").attr("x", left - 8).attr("y", y + row / 2 + 4).attr("text-anchor", "end").text(text);
  name("original", top);
  for (let rank = 0; rank < deviceCount; rank++) if (row > 13 || rank % 4 === 0) name(`rank ${rank}`, rankTop + rank * row);
  const whole = [["fine", 0, batches * forward, "original on one device, forward"], ["fine backward", batches * forward, batches * single, "original on one device, backward"]];
  const box = (selection, y) => selection.attr("y", y).attr("height", row * 0.76).attr("x", (d) => x(d.start)).attr("width", (d) => Math.max(0.6, x(d.end) - x(d.start) - 0.3));
  const wholes = svg.selectAll("rect.whole").data(whole.map(([kind, start, end, text]) => ({ kind, start, end, text }))).join("rect");
  box(wholes, top + row * 0.12).attr("class", (d) => `span role-input ${d.kind.endsWith("backward") ? "backward" : ""}`);
  hoverTip(wholes, (d) => [d.text, cost(d.end - d.start)]);
  const spans = svg.selectAll("rect.step").data(step.spans.map((span) => ({ span, kind: span[1], start: span[5], end: span[6] }))).join("rect");
  box(spans, (d) => rankTop + d.span[0] * row + row * 0.12)
    .attr("class", (d) => `span role-${ROLE_OF[d.kind]} ${d.kind.endsWith("backward") ? "backward" : ""} ${d.span[7] ? "critical" : ""}`)
    .attr("role", "img").attr("aria-label", (d) => spanLines(d.span, step).filter(Boolean).join(", "));
  roving(spans);
  withTip(spans, (d) => spanLines(d.span, step));
  svg.append("line").attr("class", "mark").attr("x1", x(step.time)).attr("x2", x(step.time)).attr("y1", rankTop - 12).attr("y2", bottom + 6);
  svg.append("text").attr("class", "mark-text").attr("x", x(step.time) + 6).attr("y", rankTop - 4)
    .text(`${shortCost(step.time)}, ${((batches * single) / step.time).toFixed(2)}× as fast`);
}

function startTimeline() {
  if (data.timeline.reason) {
    byId("batches").closest("label").remove();
    return empty("timeline-chart", `Nothing to simulate: ${data.timeline.reason}.`);
  }
  byId("timeline-lead").textContent = `Simulated forward and backward, with one stage${plan.windows > 1 ? " of every window" : ""} per rank and free links, in ${unit}. The top row is the original network on one device. Outlined: the critical path.`;
  byId("batches").append(...data.timeline.steps.map(({ batches }, place) => element("option", { value: place }, String(batches))));
  byId("batches").addEventListener("change", () => redrawChart("timeline-chart"));
  const shown = [["guess", "guess"], ["fine", "fine stage"], ["coarse", "correction"], ["head", "head"], ["backward", "paler: backward"], ["critical", "critical path"]];
  byId("timeline-legend").append(...shown.map(([kind, text]) => element("li", {}, element("i", { class: kind }), text)));
  chart("timeline-chart", drawTimeline);
}
