// Plots errors by interface and accuracy against the number of iterations; shows samples.

const AFTER = [
  ["guess", "guess", "preprocess"],
  ["uncorrected", "fine stage alone", "fine"],
  ["corrected", "corrected", "coarse"],
];

// Errors by interface: from the calibration, or from the selection of the operators.
function interfaceErrors() {
  if (data.calibration) {
    return data.calibration.interfaces.map((face) => ({
      stage: face.stage,
      points: { guess: face.guess_after, uncorrected: face.uncorrected, corrected: face.corrected_after },
      before: { guess: face.guess_before, corrected: face.corrected_before },
    }));
  }
  const taken = (spec) => spec?.tried.find((trial) => trial.flops === spec.flops)?.error;
  const rows = plan.stages.map((stage, number) => ({ stage: number, points: { guess: taken(stage.preprocess), corrected: taken(stage.coarse) }, before: {} }));
  return rows.filter((row) => row.points.guess !== undefined || row.points.corrected !== undefined);
}

function drawErrors(rows) {
  return (place, width) => {
    const [left, right, top, row] = [62, 20, 6, 34];
    const bottom = top + rows.length * row;
    const svg = sheet(place, width, bottom + 46, "Relative errors by interface");
    const all = rows.flatMap(({ points, before }) => [...Object.values(points), ...Object.values(before)]).filter((n) => n !== undefined);
    const x = d3.scaleLinear().domain([0, Math.max(...all, 0.01)]).nice().range([left, width - right]);
    bottomAxis(svg, x, bottom, Math.max(2, Math.floor(width / 110)), null, bottom - top);
    svg.append("text").attr("class", "mark-text").attr("x", width - right).attr("y", bottom + 34).attr("text-anchor", "end").text("error relative to the state; hollow: before calibration");
    const lines = svg.selectAll("g.row").data(rows).join("g").attr("transform", (_, at) => `translate(0,${top + at * row})`);
    lines.append("text").attr("class", "row-name").attr("x", left - 8).attr("y", row / 2 + 4).attr("text-anchor", "end").text((d) => `stage ${d.stage}`);
    const dots = lines.selectAll("circle").data((d) => AFTER.flatMap(([key, text, role]) => [
      { key, text: `${text}, before calibration`, role, error: d.before[key], hollow: true, row: d },
      { key, text, role, error: d.points[key], row: d },
    ]).filter((dot) => dot.error !== undefined)).join("circle").attr("class", (d) => `dot role-${d.role}`).attr("r", 5)
      .attr("cx", (d) => x(d.error)).attr("cy", (d) => row / 2 + (AFTER.findIndex(([key]) => key === d.key) - 1) * 7)
      .style("fill", (d) => (d.hollow ? "var(--panel)" : "var(--role)")).style("stroke", "var(--role)");
    dots.attr("role", "img").attr("aria-label", (d) => `stage ${d.row.stage}, ${d.text}: ${d.error.toFixed(3)}`);
    roving(dots);
    withTip(dots, (d) => [`stage ${d.row.stage}, ${d.text}`, `relative error ${d.error.toFixed(4)}`]);
  };
}

function drawDial(rows) {
  return (place, width) => {
    const [left, right, top, bottom] = [44, 44, 10, 220];
    const svg = sheet(place, width, bottom + 44, "Agreement and error against iterations K");
    const hasAgreement = rows.every((row) => row.agreement !== null);
    const value = (row) => (hasAgreement ? row.agreement : row.output_error);
    const x = d3.scalePoint().domain(rows.map((row) => row.iterations)).range([left + 12, width - right - 12]);
    const y = d3.scaleLinear().domain([0, hasAgreement ? 1 : Math.max(...rows.map(value), 0.01)]).nice().range([bottom, top]);
    const speed = d3.scaleLinear().domain([0, Math.max(...rows.map((row) => row.speedup))]).nice().range([bottom, top]);
    bottomAxis(svg, x, bottom, 8);
    leftAxis(svg, y, left, 5, hasAgreement ? d3.format(".0%") : null, width - left - right);
    svg.append("g").attr("class", "axis").attr("transform", `translate(${width - right},0)`).call(d3.axisRight(speed).ticks(5).tickSizeOuter(0).tickFormat((n) => `${n}×`));
    svg.append("text").attr("class", "mark-text").attr("x", width / 2).attr("y", bottom + 36).attr("text-anchor", "middle").text(`iterations K; solid: ${hasAgreement ? "agreement with the original" : "error of the outputs"}; dashed: speed-up`);
    svg.append("path").attr("class", "line second").attr("d", d3.line((d) => x(d.iterations), (d) => speed(d.speedup))(rows));
    svg.append("path").attr("class", "line").attr("d", d3.line((d) => x(d.iterations), (d) => y(value(d)))(rows));
    const dots = svg.selectAll("circle").data(rows).join("circle").attr("class", "dot own").attr("r", 5).attr("cx", (d) => x(d.iterations)).attr("cy", (d) => y(value(d)))
      .attr("role", "img").attr("aria-label", (d) => `K = ${d.iterations}: ${hasAgreement ? percent(d.agreement) : d.output_error.toFixed(4)}, speed-up ${d.speedup.toFixed(2)}`);
    roving(dots);
    withTip(dots, (d) => [`K = ${d.iterations}`, d.agreement === null ? "" : `agreement ${percent(d.agreement)}`, `error of the outputs ${d.output_error.toFixed(4)}`, `estimate of the last state ${d.estimate_mean.toFixed(4)}`, `speed-up ${d.speedup.toFixed(2)}`]);
  };
}

// Samples as pictures: a row for the original, and for every number of iterations.
function drawPictures(place, rows) {
  const grid = element("div", { class: "pictures" });
  grid.style.setProperty("--samples", rows[0].images.length);
  for (const row of rows) {
    const mean = row.errors.length && sum(row.errors) / row.errors.length;
    grid.append(element("span", {}, row.name, row.errors.length ? element("small", {}, `error ${percent(mean, 2)}`) : null));
    row.images.forEach((src, at) => {
      const error = row.errors.length ? `, error ${percent(row.errors[at], 2)}` : "";
      const text = `sample ${at + 1}, ${row.name}${error}`;
      grid.append(element("img", { src, alt: text, title: text }));
    });
  }
  place.append(grid);
}

function startAccuracy() {
  const [rows, dial] = [interfaceErrors(), data.dial];
  const { calibration } = data;
  if (!rows.length && !dial.length) {
    return empty("accuracy-charts", "No data: this network was not calibrated, and the report was written without samples. These commands add the error at every interface and the accuracy against K:", "pnn-compile MODEL --calibrate samples.safetensors -o DIR; pnn-compile inspect DIR --samples samples.safetensors --html report.html");
  }
  if (calibration) {
    const agreement = calibration.agreement_after === null ? "" : `, agreement with the original ${percent(calibration.agreement_before)} → ${percent(calibration.agreement_after)}`;
    byId("accuracy-lead").textContent = `Calibrated on ${calibration.fitted} samples, errors on ${calibration.held_out} held-out samples: relative error of the outputs ${calibration.output_error_before.toFixed(3)} → ${calibration.output_error_after.toFixed(3)}${agreement}.`;
  } else if (rows.length) byId("accuracy-lead").textContent = "Errors on held-out samples when the operators were selected.";
  if (rows.length) {
    const place = panel("accuracy-charts", "Error by interface");
    const shown = AFTER.filter(([key]) => rows.some((row) => row.points[key] !== undefined));
    place.before(element("ul", { class: "legend" }, ...shown.map(([, text, role]) => element("li", {}, element("i", { class: role }), text))));
    chart(place, drawErrors(rows));
  }
  if (data.pictures.length) drawPictures(panel("accuracy-charts", "Samples: the original, and after K iterations"), data.pictures);
  if (dial.length) chart(panel("accuracy-charts", `Accuracy against K, on ${dial[0].samples} samples`), drawDial(dial));
}
