"use strict";
// What every page shares: colours, sizes as a person reads them, choices, tables that sort.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const redraws = []; // each draws one plot anew, in the colours of now
const CATEGORIES = {
  "parameter": "#4e79a7", "buffer": "#86bcb6", "library workspace": "#8c8c8c", "input": "#d4a6c8", "other": "#bab0ac",
  "optimizer state": "#7d67b3", "gradient": "#59a14f", "activation": "#f28e2b", "recomputed": "#d1495b",
  "temporary": "#e9c03f", "optimizer temporary": "#d37295", "inside the op": "#9c755f",
};
const SIZES = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]];
// Named one by one: of plotly's own buttons, one sends the chart to its maker's servers.
const CONFIG = {
  displaylogo: false, responsive: true, plotlyServerURL: "",
  modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};
const NO_AXES = { ...CONFIG, modeBarButtons: [["toImage"]] };

const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const categoryColor = (name) => CATEGORIES[name] || "#bab0ac";
const sizeUnit = (n) => SIZES.find(([, size]) => Math.abs(n) >= size) || ["B", 1];
const exact = (n) => n.toString().replace(/\B(?=(\d{3})+$)/g, ",");
// plotly reads a little HTML in its texts
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function bytes(n) {
  const [unit, size] = sizeUnit(n);
  return size === 1 ? `${n} B` : `${(n / size).toFixed(2)} ${unit}`;
}

function seconds(s) {
  return s >= 1 ? `${s.toFixed(2)} s` : `${(s * 1e3).toFixed(2)} ms`;
}

// Ticks at round numbers of the unit that suits the largest value; the values themselves stay bytes.
function byteAxis(low, high) {
  const [unit, size] = sizeUnit(high);
  const rough = (high - low) / size / 7;
  const power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= rough) || power;
  const tickvals = [];
  for (let k = Math.ceil(low / size / step); k * step * size <= high; k++) tickvals.push(k * step * size);
  const digits = [0, 1, 2, 3].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-9) ?? 3;
  return { range: [low, high], tickvals, ticktext: tickvals.map((v) => (v / size).toFixed(digits)), title: { text: unit } };
}

function layout(more) {
  const axis = { gridcolor: color("grid"), linecolor: color("line"), zerolinecolor: color("line") };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("text"), size: 13, family: getComputedStyle(document.body).fontFamily },
    margin: { l: 56, r: 16, t: 40, b: 44 },
    hoverlabel: { align: "left", bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text"), size: 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("quiet"), activecolor: color("accent") },
    ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis },
  };
}

// A legend below the plot, and the room that it takes: plotly's own reckoning of that may not come to an end.
function legendBelow(div, entries) {
  const rows = Math.ceil((entries * 165) / Math.max(div.clientWidth - 72, 165)), height = rows * 20 + 8;
  return {
    legend: { orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", traceorder: "normal", entrywidth: 140 },
    bottom: 46 + height,
  };
}

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function redraw() {
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(isDark()));
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  redraws.forEach((draw) => draw());
}

function remembered(key, value) {
  try { // a page from a file may have no storage
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { /* it is only not remembered */ }
  return null;
}

function themes() {
  const before = remembered("ullage-theme");
  if (before === "dark" || before === "light") root.dataset.theme = before;
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered("ullage-theme", root.dataset.theme);
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

// Groups of buttons of which one is pressed. `chosen` is what it starts with; `then` is called after each change.
function choice(name, chosen, then) {
  const group = document.querySelector(`[data-choice="${name}"]`);
  if (!group) return;
  const buttons = [...group.querySelectorAll("button")];
  const press = (value) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === value)));
  buttons.forEach((b) => b.addEventListener("click", () => { press(b.dataset.value); then(b.dataset.value); }));
  press(chosen);
}

function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numbers = head.classList.contains("number");
      const now = head.getAttribute("aria-sort");
      const up = now ? now === "descending" : !numbers; // numbers: the largest first
      table.querySelectorAll("th[aria-sort]").forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return numbers ? Number(cell.dataset.sort ?? cell.textContent) : cell.textContent;
      };
      const order = (a, b) => numbers ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, { numeric: true });
      body.append(...[...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
    });
  });
}

function start() {
  themes();
  document.querySelectorAll("table.sortable").forEach(sortable);
  redraw();
}
