// The plan in words: decisions, reasons and what else was tried.

const SWEEPS = { chain: "chain: the corrected state goes from stage to stage", collapsed: "collapsed: every residual goes straight to the last state" };
const FORMS = { residual: "residual form (the paper's, for training)", difference: "difference form (classical parareal)" };

function pairs(rows) {
  return rows.filter(([, value]) => value !== "" && value !== null && value !== undefined).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

const span = (first, last) => (first === last ? first : `${first} … ${last}`);
const number = (value) => Number(value.toPrecision(4));

function trials(title, spec) {
  if (!spec) return [];
  const known = Object.entries(spec.options).filter(([, value]) => !Array.isArray(value) || value.length);
  const options = known.map(([key, value]) => `${key} = ${Array.isArray(value) ? value.join(", ") : value}`).join("; ");
  const found = [
    element("h3", {}, `${title}: ${spec.family}`),
    element("p", {}, [`${count(spec.flops)} FLOPs, ${count(spec.parameters)} parameters of its own, ${spec.linear ? "linear" : "not linear"}`, spec.why].filter(Boolean).join("; "), "."),
  ];
  if (options) found.push(element("p", { class: "sub" }, options));
  if (spec.tried.length) {
    const rows = [...spec.tried].sort((a, b) => a.error - b.error).map((trial) => [trial.name, count(trial.flops), number(trial.error)]);
    found.push(table([["tried", "code"], ["FLOPs", "num"], ["error left", "num"]], rows, (row) => row[1] === count(spec.flops)));
  }
  return found;
}

function cutDetails(face) {
  const why = face.why;
  const said = typeof why === "string" && why ? [element("p", {}, sentence(why))] : [];
  const rows = face.state.map(([name, type]) => [name, type]);
  return [
    element("h3", {}, `Cut behind ${face.after}`),
    ...said,
    element("p", {}, `${size(face.bytes)} cross at the example inputs${face.module ? `; behind it begins ${face.module}` : ""}.`),
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
  const known = plan.forecast;
  byId("decisions").append(...pairs([
    ["Form", FORMS[plan.correction] || plan.correction],
    ["Sweep", SWEEPS[plan.sweep] || plan.sweep],
    ["Iterations K", plan.iterations],
    ["Costs", plan.cost],
    ["Original", cost(known.sequential)],
    ["Slowest stage with its guess", cost(known.makespan)],
    ["Serial part", `${cost(known.serial)} (${percent(known.serial_share)})`],
    ["Step", cost(known.time)],
    ["Captured by", data.capture.rung],
    ["Batch size", data.capture.dynamic_batch ? "free" : "fixed"],
    ["Seed", plan.seed],
    ["Fingerprint", plan.fingerprint.slice(0, 16)],
  ]));
  byId("stages").append(element("h3", {}, "Stages"), ...plan.stages.map(stageDetails));
  const notes = [...plan.notes, ...Object.entries(plan.ties).map(([name, where]) => `${name} is shared by stages ${where.map((at) => (at === stageCount ? "head" : at)).join(", ")}`)];
  const lists = [["Notes", notes], ["Other ways to capture it, and why they were left", data.capture.rejected]];
  for (const [title, lines] of lists) if (lines.length) byId("notes").append(element("h3", {}, title), element("ul", {}, ...lines.map((line) => element("li", {}, line))));
  if (data.passes.length) byId("notes").append(element("h3", {}, "Passes of the compiler"), element("p", { class: "sub" }, data.passes.map(([name, time]) => `${name} ${seconds(time)}`).join(", ")));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of opened) each.open = false; });
}
