// Shows the plan in words: decisions, reasons and rejected candidates.

const SWEEPS = { chain: "chain: every stage corrects the state and passes it to the next one", collapsed: "collapsed: every residual corrects the last state directly" };
const FORMS = { residual: "residual form (the paper's, for training)", difference: "difference form (classical parareal)" };

function pairs(rows) {
  return rows.filter(([, value]) => value !== "" && value !== null && value !== undefined).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

const span = (first, last) => (first === last ? first : `${first} … ${last}`);
const number = (value) => Number(value.toPrecision(4));

function trials(title, spec) {
  if (!spec) return [];
  const entries = Object.entries(spec.options).filter(([, value]) => !Array.isArray(value) || value.length);
  const options = entries.map(([key, value]) => `${key} = ${Array.isArray(value) ? value.join(", ") : value}`).join("; ");
  const parts = [
    element("h3", {}, `${title}: ${spec.family}`),
    element("p", {}, [`${count(spec.flops)} FLOPs, ${count(spec.parameters)} parameters, ${spec.linear ? "linear" : "not linear"}`, spec.why].filter(Boolean).join("; "), "."),
  ];
  if (options) parts.push(element("p", { class: "sub" }, options));
  if (spec.tried.length) {
    const rows = [...spec.tried].sort((a, b) => a.error - b.error).map((trial) => [trial.name, count(trial.flops), number(trial.error)]);
    parts.push(table([["tried", "code"], ["FLOPs", "num"], ["error left", "num"]], rows, (row) => row[1] === count(spec.flops)));
  }
  return parts;
}

function cutDetails(face) {
  const why = face.why;
  const reason = typeof why === "string" && why ? [element("p", {}, sentence(why))] : [];
  const rows = face.state.map(([name, type]) => [name, type]);
  return [
    element("h3", {}, `Cut after ${face.after}`),
    ...reason,
    element("p", {}, `${size(face.bytes)} cross at the example inputs${face.module ? `; the next stage starts with ${face.module}` : ""}.`),
    table([["state", "code"], ["type", "code"]], rows),
  ];
}

function stageDetails(stage, at) {
  const face = plan.interfaces[at];
  const brief = span(stage.first_module || stage.first, stage.last_module || stage.last);
  const facts = `${stage.nodes} nodes, ${count(stage.flops)} FLOPs forward, ${count(stage.backward_flops)} backward, ${count(stage.parameters)} parameters (${size(stage.parameter_bytes)})${stage.seconds === null ? "" : `, ${seconds(stage.seconds)} measured`}${stage.device ? `, on ${stage.device}` : ""}${stage.memory ? `, ${size(stage.memory)} of memory` : ""}.`;
  const sides = stage.sides.length ? [element("p", {}, `Recomputes side values: ${stage.sides.join(", ")}.`)] : [];
  return element("details", {}, element("summary", {}, element("b", {}, `Stage ${at}`), " ", element("span", {}, brief)),
    element("div", {}, element("p", {}, facts), ...sides, ...trials("Guess", stage.preprocess), ...trials("Coarse propagator", stage.coarse), ...cutDetails(face)));
}

function startPlan() {
  const forecast = plan.forecast;
  byId("decisions").append(...pairs([
    ["Form", FORMS[plan.correction] || plan.correction],
    ["Sweep", SWEEPS[plan.sweep] || plan.sweep],
    ...(plan.windows > 1 ? [["Windows", `${plan.windows} of ${deviceCount} stages each, one after another`]] : []),
    ["Iterations K", plan.iterations],
    ["Costs", plan.cost],
    ["Original", cost(forecast.sequential)],
    [plan.windows > 1 ? "Slowest stage with its guess, of all windows" : "Slowest stage with its guess", cost(forecast.makespan)],
    ["Serial part", `${cost(forecast.serial)} (${percent(forecast.serial_share)})`],
    ["Step", cost(forecast.time)],
    ["Captured by", data.capture.rung],
    ["Validated", data.capture.compared],
    ["Free dimensions", data.capture.dynamic.join(", ") || "none"],
    ["Seed", plan.seed],
    ["Fingerprint", plan.fingerprint.slice(0, 16)],
  ]));
  byId("stages").append(element("h3", {}, "Stages"), ...plan.stages.map(stageDetails));
  const notes = [...plan.notes, ...Object.entries(plan.ties).map(([name, where]) => `${name} is shared by stages ${where.map((at) => (at === stageCount ? "head" : at)).join(", ")}`)];
  const lists = [["Notes", notes], ["Rejected front ends of the capture, and why", data.capture.rejected]];
  for (const [title, lines] of lists) if (lines.length) byId("notes").append(element("h3", {}, title), element("ul", {}, ...lines.map((line) => element("li", {}, line))));
  if (data.passes.length) byId("notes").append(element("h3", {}, "Passes of the compiler"), element("p", { class: "sub" }, data.passes.map(([name, time]) => `${name} ${seconds(time)}`).join(", ")));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
}
