// Data, number formats, the hover box and the theme. All text is set through textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const plan = data.plan;
const stageCount = plan.stages.length;
const deviceCount = stageCount / plan.windows;
const unit = plan.forecast.unit;

const byId = (id) => document.getElementById(id);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

const PREFIXES = ["", "k", "M", "G", "T", "P"];

function count(number) {
  let step = 0;
  while (Math.abs(number) >= 999.5 && step < PREFIXES.length - 1) {
    number /= 1000;
    step += 1;
  }
  const digits = Math.abs(number) >= 100 ? number.toFixed(0) : String(Number(number.toPrecision(3)));
  return digits + PREFIXES[step];
}

const size = (bytes) => `${count(bytes)}B`;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

function seconds(number) {
  if (number >= 1 || number === 0) return `${Number(number.toPrecision(3))} s`;
  return number >= 1e-3 ? `${Number((number * 1e3).toPrecision(3))} ms` : `${Number((number * 1e6).toPrecision(3))} µs`;
}

// A cost in the unit of the plan.
const cost = (number) => (unit === "seconds" ? seconds(number) : unit === "FLOPs" ? `${count(number)} FLOPs` : count(number));
const shortCost = (number) => (unit === "seconds" ? seconds(number) : count(number));

function shortened(text, most) {
  if (text.length <= most) return text;
  const tail = Math.ceil((most - 1) * 0.6);
  return `${text.slice(0, most - 1 - tail)}…${text.slice(-tail)}`;
}

const tip = byId("tip");

// Show lines beside the pointer or the element; the first is the title.
function showTip(lines, x, y) {
  tip.replaceChildren(...lines.filter(Boolean).map((line, place) => element(place ? "span" : "b", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 10) : y + 18}px`;
}

const hideTip = () => { tip.hidden = true; };

// Show a hover box for a d3 selection under the pointer.
function hoverTip(selection, lines) {
  return selection
    .on("pointermove.tip", (event, datum) => showTip(lines(datum), event.clientX, event.clientY))
    .on("pointerleave.tip", hideTip);
}

// The same for pointer and keyboard: elements with a focus listener are reached by Tab.
function withTip(selection, lines) {
  hoverTip(selection, lines)
    .on("blur.tip", hideTip)
    .on("focus.tip", function (event, datum) {
      if (!this.matches(":focus-visible")) return;
      const box = this.getBoundingClientRect();
      showTip(lines(datum), box.left + box.width / 2, box.bottom - 10);
    });
  return selection;
}

// Move along elements with the arrow keys; the Tab key reaches one of them.
function roving(selection) {
  const all = selection.nodes();
  selection.attr("tabindex", function () { return this === all[0] ? 0 : -1; }).on("keydown.roving", function (event) {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    const next = step && all[all.indexOf(this) + step];
    if (!step) return;
    event.preventDefault();
    if (!next) return;
    this.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
  return selection;
}

const THEMES = ["system", "light", "dark"];

// A page opened from disk may have no storage.
function stored(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

function setTheme(theme) {
  if (theme === "system") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  byId("theme").textContent = `Theme: ${theme}`;
  stored(() => localStorage.setItem("pnn-compile theme", theme));
}

function startTheme() {
  const kept = stored(() => localStorage.getItem("pnn-compile theme"));
  let theme = THEMES.includes(kept) ? kept : "system";
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
  });
}

// Capitalize a message of the compiler and end it with a period.
const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

function empty(where, text, command) {
  byId(where).replaceChildren(
    element("p", { class: "empty" }, text, ...(command ? [" ", element("code", {}, command)] : [])),
  );
}

function table(columns, rows, marked = () => false) {
  const head = element("tr", {}, ...columns.map(([name, kind]) => element("th", { class: kind, scope: "col" }, name)));
  const body = rows.map((row) =>
    element("tr", { class: marked(row) ? "taken" : null }, ...row.map((cell, place) => element("td", { class: columns[place][1] }, cell))),
  );
  return element("div", { class: "scroll", tabindex: 0 }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)));
}
