// Time and speed-up against the number of stages.

function startForecast() {
  const known = data.forecast;
  if (!known) {
    return empty("forecast-chart", `With ${stageCount} stages a step takes ${cost(plan.forecast.time)} where the original takes ${cost(plan.forecast.sequential)}: ${plan.forecast.speedup.toFixed(2)} times as fast. What other numbers of stages give was not computed for this report.`);
  }
}
