// A bar per side: what is alive at its peak, by category.
function drawBars() {
  const sides = data.sides.filter((s) => s.peak !== null).reverse(); // plotly's first bar is the lowest
  const names = sides.map((s) => s.letter);
  const traces = data.categories.filter((c) => sides.some((s) => s.parts && s.parts[c])).map((c) => ({
    type: "bar", orientation: "h", name: c, y: names, x: sides.map((s) => (s.parts ? s.parts[c] || 0 : 0)), marker: { color: categoryColor(c) },
    text: sides.map((s) => `<b>${s.letter}</b> ${c}<br>${bytes(s.parts ? s.parts[c] || 0 : 0)}`), textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  }));
  if (sides.some((s) => !s.parts)) {
    traces.push({
      type: "bar", orientation: "h", name: "peak", y: names, x: sides.map((s) => (s.parts ? 0 : s.peak)), marker: { color: color("ghost") },
      text: sides.map((s) => `<b>${s.letter}</b><br>${bytes(s.peak)}`), textposition: "none", hovertemplate: "%{text}<extra></extra>",
    });
  }
  const high = Math.max(...sides.map((s) => s.peak)) * 1.18;
  const div = document.getElementById("bars");
  const { legend, bottom } = legendBelow(div, traces.length);
  div.style.height = `${12 + 46 * sides.length + bottom}px`;
  Plotly.react(div, traces, layout({
    barmode: "stack", bargap: 0.3, legend, margin: { l: 40, r: 16, t: 12, b: bottom },
    xaxis: byteAxis(0, high), yaxis: { type: "category" },
    annotations: sides.map((s) => ({
      x: s.peak, y: s.letter, xref: "x", yref: "y", xanchor: "left", text: ` ${bytes(s.peak)}`, showarrow: false, font: { color: color("text") },
    })),
  }), CONFIG);
}

if (document.getElementById("bars")) redraws.push(drawBars);
start();
