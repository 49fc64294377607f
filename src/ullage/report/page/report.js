// The report's plots. Bytes in `data` are exact.
const views = data.views;
const shown = { view: views.planned ? "planned" : "plain", step: "", axis: "time" };
shown.step = views[shown.view].peakStep;

const totals = (step) => step.event.map((_, i) => Object.values(step.live).reduce((sum, n) => sum + n[i], 0));

// Where the events start, in the axis' unit, strictly ascending (an op may take no time), and where the last one ends.
function places(step, unit) {
  if (shown.axis === "op") return { xs: step.event, end: step.events };
  const least = 1e-9 * (step.seconds || 1);
  let before = -least;
  const xs = step.start.map((x) => (before = Math.max(x, before + least)));
  return { xs: xs.map((x) => x / unit), end: Math.max(step.seconds, before + least) / unit };
}

function described(view, step, i) {
  const parts = Object.entries(step.live).map(([name, n]) => [name, n[i]]).filter(([, n]) => n);
  parts.sort((a, b) => b[1] - a[1]);
  const total = parts.reduce((sum, [, n]) => sum + n, 0);
  return [
    `<b>${bytes(total)}</b> (${exact(total)} bytes)`,
    `${view.phases[step.phase[i]]}${step.again[i] ? ", recomputed" : ""}${step.micro.at(-1) ? `, micro-batch ${step.micro[i]}` : ""}, op ${step.event[i]}`,
    plain(view.modules[step.module[i]] || "(root)"), plain(view.ops[step.op[i]]), plain(view.sources[step.source[i]]),
    ...parts.map(([name, n]) => `${name} ${bytes(n)}`),
  ].filter(Boolean).join("<br>");
}

// Runs of events of one micro-batch and phase.
function runs(step) {
  const found = [];
  step.phase.forEach((phase, i) => {
    const last = found.at(-1);
    if (last && last.phase === phase && last.micro === step.micro[i]) return;
    found.push({ phase, micro: step.micro[i], from: i });
  });
  return found;
}

function bands(view, step, xs, end, width) {
  const shapes = [], labels = [], several = step.micro.at(-1) > 0;
  const found = runs(step);
  found.forEach((run, k) => {
    const x0 = xs[run.from], x1 = k + 1 < found.length ? xs[found[k + 1].from] : end;
    shapes.push({
      type: "rect", xref: "x", yref: "paper", x0, x1, y0: 1.01, y1: 1.035, line: { width: 0 }, fillcolor: color(`band${run.phase}`),
    });
    const text = `${view.phases[run.phase]}${several ? ` ${run.micro}` : ""}`;
    if (((x1 - x0) / end) * width < text.length * 7 + 4) return;
    labels.push({
      x: (x0 + x1) / 2, y: 1.04, xref: "x", yref: "paper", yanchor: "bottom", text, showarrow: false,
      font: { size: 12, color: color("quiet") },
    });
  });
  return { shapes, labels };
}

// The highest moment of the step, named, with its text where there is more room.
function peakLabel(view, step, xs, total, end, top) {
  const i = step.peak, x = xs[i], left = x > end / 2;
  const isPeak = shown.step === view.peakStep;
  const lines = [
    `<b>${isPeak ? "peak" : "highest of this step"} ${bytes(total[i])}</b>`, `${exact(total[i])} bytes`,
    `${view.phases[step.phase[i]]}${step.again[i] ? ", recomputed" : ""}, ${plain(view.modules[step.module[i]] || "(root)")}`,
    plain(view.ops[step.op[i]]), plain(view.sources[step.source[i]]),
  ].filter(Boolean);
  return {
    name: "peak", x, y: total[i], xref: "x", yref: "y", text: lines.join("<br>"), showarrow: true, arrowhead: 2, arrowsize: 1.1,
    arrowwidth: 1.4, arrowcolor: color("text"), axref: "x", ayref: "y", ax: x + (left ? -0.05 : 0.05) * end, ay: top * 0.985,
    xanchor: left ? "right" : "left", yanchor: "top", align: "left", bgcolor: color("card"), bordercolor: color("text"), borderpad: 5,
    font: { size: 12, color: color("text") },
  };
}

function drawTimeline() {
  const view = views[shown.view], step = view.steps[shown.step], steps = Object.values(views).map((v) => v.steps[shown.step]);
  const longest = Math.max(...steps.map((s) => s.seconds)), unit = longest >= 1 ? 1 : 1e-3;
  const { xs, end } = places(step, unit), total = totals(step);
  const highest = Math.max(...Object.values(views).map((v) => v.peak));
  const bounded = data.budget !== null && data.budget <= 2 * highest;
  const top = Math.max(highest, bounded ? data.budget : 0) * 1.32;
  const farthest = shown.axis === "op" ? Math.max(...steps.map((s) => s.events)) : longest / unit;
  const last = (n) => [...n, n.at(-1)], x = [...xs, end];
  const traces = view.categories.filter((name) => step.live[name]).map((name) => ({
    name, x, y: last(step.live[name]), stackgroup: "live", mode: "lines", line: { width: 0, shape: "hv" },
    fillcolor: categoryColor(name), hoverinfo: "skip",
  }));
  traces.push({
    name: "live bytes", x, y: last(total), mode: "lines", line: { width: 1.2, color: color("text"), shape: "hv" }, showlegend: false,
    text: last(step.event.map((_, i) => described(view, step, i))), hovertemplate: "%{text}<extra></extra>",
  });
  if (shown.view === "planned") {
    const other = views.plain.steps[shown.step], there = places(other, unit);
    traces.push({
      name: "plain step", x: [...there.xs, there.end], y: last(totals(other)), mode: "lines", hoverinfo: "skip",
      line: { width: 1.4, color: color("ghost"), dash: "dot", shape: "hv" },
    });
  }
  if (bounded) {
    traces.push({
      name: `budget ${bytes(data.budget)}`, x: [0, farthest], y: [data.budget, data.budget], mode: "lines", hoverinfo: "skip",
      line: { width: 2, color: color("over"), dash: "dash" },
    });
  }
  const div = document.getElementById("timeline"), width = div.clientWidth - 72;
  const { shapes, labels } = bands(view, step, xs, end, width * (end / farthest));
  const { legend, bottom } = legendBelow(div, traces.length - 1);
  Plotly.react(div, traces, layout({
    hovermode: "x", legend, shapes,
    annotations: [...labels, peakLabel(view, step, xs, total, farthest, top)], margin: { l: 56, r: 16, t: 44, b: bottom },
    xaxis: { range: [0, farthest], ticksuffix: shown.axis === "op" ? " ops" : unit === 1 ? " s" : " ms", showticksuffix: "last", showgrid: false },
    yaxis: byteAxis(0, top),
  }), CONFIG);
  const thinned = step.event.length < step.events
    ? ` ${exact(step.events)} ops, of which ${exact(step.event.length)} are drawn: the highest of each part of the step.` : "";
  const budget = data.budget !== null && !bounded ? ` The budget, ${bytes(data.budget)}, is far above.` : "";
  document.getElementById("timeline-said").textContent =
    `The ${shown.step} step, ${shown.view}: at most ${bytes(total[step.peak])} (${exact(total[step.peak])} bytes).${thinned}${budget}`;
}

// What leaves memory and what comes back, on the time axis of the step.
function drawLanes() {
  const view = views[shown.view], div = document.getElementById("lanes");
  if (!div || !view.transfers) return;
  const lanes = view.transfers[shown.step], step = view.steps[shown.step];
  const longest = Math.max(...Object.values(views).map((v) => v.steps[shown.step].seconds)), unit = longest >= 1 ? 1 : 1e-3;
  const ways = ["out", "back"];
  Plotly.react(div, lanes.map((lane, k) => ({
    type: "bar", orientation: "h", name: lane.name, y: lane.start.map(() => ways[k]), base: lane.start.map((x) => x / unit),
    x: lane.seconds.map((x) => x / unit), width: 0.6, marker: { color: color("accent"), line: { width: 0 } },
    text: lane.bytes.map((n, i) => `${lane.name}: <b>${bytes(n)}</b> (${exact(n)} bytes)<br>${seconds(lane.seconds[i])}`),
    hovertemplate: "%{text}<extra></extra>", textposition: "none",
  })), layout({
    barmode: "overlay", showlegend: false, hovermode: "closest", margin: { l: 56, r: 16, t: 6, b: 30 },
    xaxis: { range: [0, longest / unit], ticksuffix: unit === 1 ? " s" : " ms", showticksuffix: "last", showgrid: false },
    yaxis: { type: "category", categoryorder: "array", categoryarray: [...ways].reverse() },
  }), CONFIG);
  const sum = (lane, key) => lane[key].reduce((a, b) => a + b, 0);
  const waits = shown.step === "later" ? ` The step takes ${seconds(step.seconds)}, ${seconds(data.stalled)} of which it waits for them.` : "";
  document.getElementById("lanes-said").textContent = `${lanes.map((lane) =>
    `${lane.name} ${bytes(sum(lane, "bytes"))} in ${seconds(sum(lane, "seconds"))}, ${lane.bytes.length} tensors`).join("; ")}.${waits}`;
}

// Depth of each node; parents come first.
function depthOf(tree) {
  const depth = [];
  tree.parents.forEach((parent) => depth.push(parent < 0 ? 0 : depth[parent] + 1));
  return depth;
}

// As many levels at once as can be told apart; a click on a module shows more.
function levelsShown(depth) {
  const counts = [];
  depth.forEach((d) => { counts[d] = (counts[d] || 0) + 1; });
  let levels = 0, boxes = 0;
  while (levels < counts.length && (levels < 3 || boxes + counts[levels] <= 500)) boxes += counts[levels++];
  return levels;
}

// A category has its colour; a module that shows nothing of what is in it, a paler one of what most of it is.
function boxColors(view, tree, depth, levels) {
  const held = tree.labels.map(() => ({}));
  for (let i = tree.labels.length - 1; i > 0; i--) {
    const here = tree.category[i] >= 0 ? { [tree.category[i]]: tree.bytes[i] } : held[i];
    for (const [c, n] of Object.entries(here)) held[tree.parents[i]][c] = (held[tree.parents[i]][c] || 0) + n;
  }
  return tree.category.map((c, i) => {
    if (c >= 0) return categoryColor(view.categories[c]);
    if (depth[i] < levels - 1) return color("grid");
    const [most] = Object.entries(held[i]).reduce((a, b) => (b[1] > a[1] ? b : a));
    return `${categoryColor(view.categories[most])}b0`;
  });
}

function drawTree() {
  const view = views[shown.view], tree = view.tree, depth = depthOf(tree), levels = levelsShown(depth);
  const names = []; // parents come first
  tree.labels.forEach((label, i) => {
    const above = tree.parents[i] >= 0 ? names[tree.parents[i]] : "";
    names.push(tree.category[i] >= 0 ? `${above || "(root)"}: ${label}` : above ? `${above}.${label}` : label);
  });
  const share = tree.bytes.map((n) => ((100 * n) / Math.max(view.peak, 1)).toFixed(1));
  Plotly.react("tree", [{
    type: "treemap", branchvalues: "total", maxdepth: levels, sort: true, tiling: { pad: 2 }, values: tree.bytes,
    ids: tree.labels.map((_, i) => String(i)), parents: tree.parents.map((p) => (p < 0 ? "" : String(p))),
    labels: tree.labels.map((label, i) => plain(i ? label : "model")),
    text: tree.bytes.map((n) => bytes(n)), textinfo: "label+text",
    hovertext: tree.bytes.map((n, i) => `<b>${plain(names[i] || "the model")}</b><br>${bytes(n)} (${exact(n)} bytes)<br>${share[i]}% of the peak`),
    hoverinfo: "text", marker: { colors: boxColors(view, tree, depth, levels), line: { width: 1, color: color("card") } },
    root: { color: color("card") }, pathbar: { visible: true, textfont: { color: color("text") } },
  }], layout({ margin: { l: 0, r: 0, t: 24, b: 0 }, uniformtext: { minsize: 10, mode: "hide" } }), NO_AXES);
}

function drawFrontier() {
  const f = data.frontier, today = data.today;
  const peaks = [...f.peak, ...f.policies.map((p) => p.peak), today.peak];
  const low = Math.min(...peaks), high = Math.max(...peaks), room = (high - low || high) * 0.06;
  const times = [...f.seconds, ...f.policies.map((p) => p.seconds), today.seconds];
  const unit = Math.max(...times) >= 1 ? 1 : 1e-3;
  const said = (name, peak, s) => `<b>${plain(name)}</b><br>${bytes(peak)} (${exact(peak)} bytes)<br>${seconds(s)}`;
  const { legend, bottom } = legendBelow(document.getElementById("frontier"), 3);
  const shapes = [], annotations = [];
  for (const [name, at, dash] of [["budget", data.budget, "dash"], ["memory of the device", f.memory, "dot"]]) {
    if (at === null || at < low - room || at > high + room) continue;
    shapes.push({ type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: 1, line: { color: color("over"), width: 1.5, dash } });
    annotations.push({ x: at, y: 1, xref: "x", yref: "paper", yanchor: "bottom", text: name, showarrow: false, font: { color: color("over"), size: 12 } });
  }
  const axis = byteAxis(low - room, high + 2 * room);
  axis.title.text = `peak, ${axis.title.text}`;
  Plotly.react("frontier", [
    {
      name: "plans", x: f.peak, y: f.seconds.map((s) => s / unit), mode: "lines+markers",
      line: { shape: "hv", width: 2, color: color("accent") }, marker: { size: 7 },
      text: f.peak.map((p, i) => said("plan", p, f.seconds[i])), hovertemplate: "%{text}<extra></extra>",
    },
    {
      name: "named policies", x: f.policies.map((p) => p.peak), y: f.policies.map((p) => p.seconds / unit), mode: "markers+text",
      marker: { symbol: "x", size: 10, color: categoryColor("activation") }, textposition: "top right",
      text: f.policies.map((p) => ` ${plain(p.name)}`), customdata: f.policies.map((p) => said(p.name, p.peak, p.seconds)),
      hovertemplate: "%{customdata}<extra></extra>", textfont: { size: 12 },
    },
    {
      name: today.name, x: [today.peak], y: [today.seconds / unit], mode: "markers",
      marker: { symbol: "star", size: 17, color: color("over"), line: { width: 1, color: color("card") } },
      text: [said(today.name, today.peak, today.seconds)], hovertemplate: "%{text}<extra></extra>",
    },
  ], layout({
    hovermode: "closest", legend, shapes, margin: { l: 64, r: 16, t: 40, b: bottom }, annotations, xaxis: axis,
    yaxis: { title: { text: `step time, ${unit === 1 ? "s" : "ms"}` } },
  }), CONFIG);
}

function drawTimes() {
  const some = data.measured.filter((m) => m.times.length);
  const unit = Math.max(...some.flatMap((m) => m.times)) >= 1 ? 1 : 1e-3;
  const name = (m) => `${plain(m.name)}<br>${m.planned ? "planned" : "plain"}`;
  const shapes = some.map((m, k) => {
    const at = (m.planned && views.planned ? views.planned : views.plain).seconds / unit;
    return { type: "line", xref: "x", yref: "y", x0: at, x1: at, y0: k - 0.45, y1: k + 0.45, line: { color: color("over"), width: 2, dash: "dash" } };
  });
  Plotly.react("times", some.map((m) => ({
    type: "box", orientation: "h", name: name(m), x: m.times.map((t) => t / unit), y: m.times.map(() => name(m)), boxpoints: "all",
    jitter: 0.5, pointpos: 0, fillcolor: "rgba(0,0,0,0)", line: { color: color("accent") }, marker: { size: 7, opacity: 0.7 },
  })), layout({
    shapes, showlegend: false, margin: { l: 100, r: 16, t: 10, b: 44 },
    xaxis: { title: { text: unit === 1 ? "s" : "ms" } }, yaxis: { type: "category" },
  }), CONFIG);
}

function showView() {
  document.querySelectorAll("[data-view]").forEach((x) => { x.hidden = x.dataset.view !== shown.view; });
}

choice("view", shown.view, (value) => { shown.view = value; showView(); drawTimeline(); drawLanes(); drawTree(); });
choice("step", shown.step, (value) => { shown.step = value; drawTimeline(); drawLanes(); });
choice("axis", shown.axis, (value) => { shown.axis = value; drawTimeline(); });
document.getElementById("filter")?.addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase(), rows = [...document.querySelectorAll("#units tbody tr")];
  rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
  document.getElementById("units-said").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows.`;
});
redraws.push(drawTimeline, drawLanes, drawTree);
if (data.frontier) redraws.push(drawFrontier);
if (document.getElementById("times")) redraws.push(drawTimes);
showView();
start();
