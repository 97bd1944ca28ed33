// Compares the costs of the stages.

const PARTS = [["preprocess", "guess"], ["fine", "fine stage"], ["coarse", "coarse"], ["head", "head"]];

// Measures: value of a stage, value of an operator, number format, whether the plan balanced it.
const MEASURES = {
  forward: { name: "FLOPs forward", of: (piece) => piece.flops, operator: (spec) => spec.flops, write: count, model: unit !== "seconds" },
  backward: { name: "FLOPs backward", of: (piece) => piece.backward_flops || 0, operator: () => 0, write: count },
  seconds: { name: "seconds, measured", of: (piece) => piece.seconds || 0, operator: (spec) => spec.flops * perFlop, write: seconds, model: unit === "seconds" },
  parameters: { name: "parameters", of: (piece) => piece.parameter_bytes || 0, operator: (spec) => 4 * spec.parameters, write: size },
  activations: { name: "activations written", of: (piece) => piece.activation_bytes || 0, operator: () => 0, write: size },
};
const allFlops = sum(plan.stages.map((stage) => stage.flops)) + plan.head.flops;
const perFlop = allFlops ? plan.forecast.sequential / allFlops : 0;

function balanceRows(measure) {
  const rows = plan.stages.map((stage, number) => ({
    name: `stage ${number}`,
    parts: { preprocess: stage.preprocess ? measure.operator(stage.preprocess) : 0, fine: measure.of(stage), coarse: stage.coarse ? measure.operator(stage.coarse) : 0 },
  }));
  return [...rows, { name: "head", parts: { head: measure.of(plan.head) } }];
}

function drawBalance(place, width) {
  const measure = MEASURES[byId("measure").value];
  const rows = balanceRows(measure);
  const [left, right, top, row] = [62, 74, 34, rows.length > 24 ? 14 : 26];
  const bottom = top + rows.length * row;
  const svg = sheet(place, width, bottom + 30, `Bars of ${measure.name} by stage`);
  const total = ({ parts }) => sum(Object.values(parts));
  const fine = rows.slice(0, stageCount).map(({ parts }) => parts.fine);
  const marks = [{ at: sum(fine) / stageCount, text: "mean fine stage", side: "end" }];
  if (measure.model) marks.push({ at: Math.max(...fine), text: `bound ${plan.forecast.bound.toFixed(2)}×: slowest`, side: "start" });
  const x = d3.scaleLinear().domain([0, Math.max(...rows.map(total), 1e-12)]).nice().range([left, width - right]);
  bottomAxis(svg, x, bottom, Math.max(2, Math.floor(width / 140)), measure.write, bottom - top);
  const lines = svg.selectAll("g.row").data(rows).join("g").attr("transform", (_, place) => `translate(0,${top + place * row})`);
  lines.append("text").attr("class", "row-name").attr("x", left - 8).attr("y", row / 2 + 4).attr("text-anchor", "end").text((d) => (rows.length > 24 ? d.name.replace("stage ", "") : d.name));
  const bars = lines.selectAll("rect").data((d) => {
    let from = 0;
    return PARTS.filter(([part]) => d.parts[part]).map(([part, text]) => {
      const bar = { part, text, row: d, from, to: from + d.parts[part] };
      from = bar.to;
      return bar;
    });
  }).join("rect").attr("class", (d) => `bar role-${d.part}`).attr("y", row * 0.16).attr("height", row * 0.68)
    .attr("x", (d) => x(d.from)).attr("width", (d) => Math.max(1, x(d.to) - x(d.from) - 0.5));
  bars.attr("role", "img").attr("aria-label", (d) => `${d.row.name}, ${d.text}: ${measure.write(d.to - d.from)}`);
  roving(bars);
  withTip(bars, (d) => [`${d.row.name}, ${d.text}`, `${measure.write(d.to - d.from)}, ${percent((d.to - d.from) / (total(d.row) || 1))} of the row`, d.part === "preprocess" || d.part === "coarse" ? plan.stages[rows.indexOf(d.row)][d.part].family : ""]);
  // Right of the marks that a figure would lie on.
  const beside = (d) => marks.map(({ at }) => x(at)).sort(d3.ascending).reduce((at, mark) => (mark > at - 4 && mark < at + 40 ? mark + 6 : at), x(total(d)) + 6);
  lines.append("text").attr("class", "sub").attr("x", beside).attr("y", row / 2 + 4).text((d) => measure.write(total(d)));
  const marked = svg.selectAll("g.mark").data(marks).join("g");
  marked.append("line").attr("class", "mark").attr("x1", (d) => x(d.at)).attr("x2", (d) => x(d.at)).attr("y1", top - 4).attr("y2", bottom);
  marked.append("text").attr("class", "mark-text").attr("x", (d) => x(d.at)).attr("y", (_, place) => 12 + 13 * place).attr("text-anchor", "end").text((d) => `${d.text} ${measure.write(d.at)}`);
}

function startBalance() {
  const shown = Object.entries(MEASURES).filter(([, measure]) => sum(balanceRows(measure).map((row) => sum(Object.values(row.parts)))));
  byId("measure").append(...shown.map(([key, measure]) => element("option", { value: key }, measure.name)));
  const first = shown.find(([, measure]) => measure.model) || shown[0];
  if (!first) return empty("balance-chart", "No cost of this model was counted.");
  byId("measure").value = first[0];
  byId("measure").addEventListener("change", () => redrawChart("balance-chart"));
  const forecast = plan.forecast;
  byId("balance-lead").textContent = `The slowest fine stage takes ${forecast.imbalance.toFixed(3)} times the mean; the cut is within ${percent(forecast.gap, 2)} of the optimum. Guesses run with their stages, then the corrections one after another, then the head.`;
  chart("balance-chart", drawBalance);
}
