// Fills the page.

function startHeader() {
  const forecast = plan.forecast;
  byId("model").textContent = plan.model;
  byId("subtitle").textContent = `Parareal neural network of ${stageCount} stages${plan.windows > 1 ? ` in ${plan.windows} windows` : ""}, ${plan.correction} form, ${plan.sweep} sweep, K = ${plan.iterations}`;
  if (plan.windows > 1) byId("lanes").textContent = `the lanes of a window start at once, ${deviceCount} lanes each`;
  const figures = [
    ["Speed-up", `${forecast.speedup.toFixed(2)}×`, `predicted by ${unit}, links ${plan.stages.some((stage) => stage.device) ? "counted" : "free"}`],
    ["Bound", `${forecast.bound.toFixed(2)}×`, "guesses and corrections free"],
    ["Imbalance", forecast.imbalance.toFixed(3), "slowest stage over mean"],
    ["Serial share", percent(forecast.serial_share), "coarse sweep and head"],
    ["Parameters", count(sum(plan.stages.map((stage) => stage.parameters))), "in the fine stages"],
    ["Nodes", count(nodes.filter((node) => node.role === "fine" || node.role === "head").length), "in the captured graph"],
  ];
  byId("figures").append(...figures.map(([name, value, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, text)))));
}

// Mark the link of the section on the screen.
function followSections() {
  const links = [...document.querySelectorAll("#sections a")];
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.find(({ hash }) => hash === `#${entry.target.id}`);
      if (entry.isIntersecting) {
        for (const other of links) other.removeAttribute("aria-current");
        link.setAttribute("aria-current", "true");
      }
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) observer.observe(section);
}

startTheme();
startHeader();
startGraph();
startSearch();
startBalance();
startForecast();
startTimeline();
startAccuracy();
startPlan();
drawCharts();
followSections();
addEventListener("resize", drawCharts);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
performance.mark("ready");
document.documentElement.dataset.ready = "true";
