// The page of a run: one state, one function per thing drawn from it, no network.
"use strict";
(() => {
const run = JSON.parse(document.getElementById("run").textContent);
const at = id => document.getElementById(id);
const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u1: Uint8Array };
const BLUE = "#0072B2", OTHERS = ["#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"];
const DASHES = ["dash", "dashdot", "dot", "longdash"];
const MARKERS = ["square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left", "triangle-right", "pentagon", "hexagon", "star", "diamond-tall"];
const FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif";
const T = run.steps.length, U = run.updates.length, D = run.definitions.length, S = run.sources.length, R = run.targets.length;
const small = Math.max(S, R) <= run.readable;

// ---- the data -------------------------------------------------------------------------------------------------
function decode(packed) {
  if (!packed) return null;
  if ("constant" in packed) return { at: () => packed.constant === null ? NaN : packed.constant };
  const bytes = Uint8Array.from(atob(packed.base64), c => c.charCodeAt(0));
  const values = new ARRAYS[packed.type](bytes.buffer);
  return { at: i => values[i] };
}
const decodeAll = group => Object.fromEntries(Object.entries(group).map(([name, packed]) => [name, decode(packed)]));
const cells = decodeAll(run.cells), averages = decodeAll(run.averages), scalars = decodeAll(run.scalars);
const look = (t, u, d) => (t * U + u) * D + d;
const place = (t, s, r) => (look(t, state.u, state.d) * S + s) * R + r;
const read = (group, name, i) => group[name] ? group[name].at(i) : NaN;

function number(value) {
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  return value === 0 || (size >= 0.01 && size < 1000) ? value.toFixed(3) : value.toExponential(2);
}
const same = (s, r) => run.sources[s] === run.targets[r];
const state = { t: T - 1, u: 0, d: 0, statistic: "mean", view: "averages", axis: run.epochs ? "epoch" : "step", s: 0, r: 0, pinned: false };

// ---- colours --------------------------------------------------------------------------------------------------
const scale = () => run.scales[state.statistic][state.u][state.d];
const palette = () => scale().diverging ? run.diverging : run.sequential;
function fraction(value) {
  const { low, high, log } = scale();
  const f = log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  return Math.min(1, Math.max(0, f));
}
function colour(value) {
  if (Number.isNaN(value) || (scale().log && value <= 0)) return null;
  return palette()[Math.round(fraction(value) * (palette().length - 1))];
}
function ink(hex) {
  // White below the luminance where it reads better than black.
  const [r, g, b] = [1, 3, 5].map(i => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b < 0.18 ? "#fff" : "#000";
}

// ---- the matrix -----------------------------------------------------------------------------------------------
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
let tds = [], longest = 5;

function buildTable() {
  const table = make("table", null, { role: "grid", "aria-label": "S_rel, class stepped on by class moved" });
  const head = table.createTHead().insertRow();
  head.append(make("th", "step on ↓  moved →", { class: "corner" }));
  for (const name of run.targets) {
    const th = make("th", null, { scope: "col", title: name });
    th.append(make("span", name));
    head.append(th);
  }
  const body = table.createTBody();
  tds = run.sources.map((source, s) => {
    const row = body.insertRow();
    row.append(make("th", source, { scope: "row" }));
    return run.targets.map((target, r) => {
      const td = make("td", "", { role: "gridcell", "data-source": source, "data-target": target, tabindex: s + r ? -1 : 0 });
      td.addEventListener("mouseenter", () => describe(s, r));
      td.addEventListener("focus", () => describe(s, r));
      td.addEventListener("click", () => pin(s, r));
      td.addEventListener("keydown", event => move(event, s, r));
      row.append(td);
      return td;
    });
  });
  table.addEventListener("mouseleave", () => describe(state.s, state.r));
  at("matrix").append(table);
  at("matrix").classList.toggle("many", R > 5);
}

// Room for the longest number seen so far; a narrow screen scrolls instead of overprinting.
const widen = () => { at("matrix").firstChild.style.minWidth = R > 5 ? `${6.5 + R * Math.max(2.45, 0.46 * longest)}rem` : `${5 + 0.62 * longest * R}rem`; };

function move(event, s, r) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(s, r); }
  const next = by && (tds[s + by[0]] || [])[r + by[1]];
  if (!next) return;
  event.preventDefault();
  tds[s][r].tabIndex = -1; next.tabIndex = 0; next.focus();
}

function drawMatrix() {
  if (!small) return drawHeatMap();
  for (let s = 0; s < S; s++) for (let r = 0; r < R; r++) {
    const i = place(state.t, s, r), value = read(cells, state.statistic, i), td = tds[s][r], fill = colour(value);
    td.textContent = number(value);
    longest = Math.max(longest, td.textContent.length);
    td.classList.toggle("undefined", fill === null);
    td.classList.toggle("heavy", read(cells, "heavy_tailed", i) > 0);
    td.style.backgroundColor = fill || "";
    td.style.color = fill ? ink(fill) : "";
    td.title = sentence(s, r);
    td.setAttribute("aria-selected", String(state.pinned && s === state.s && r === state.r));
  }
  widen();
}

function drawHeatMap() {
  const { low, high, log } = scale(), z = [], text = [];
  for (let s = 0; s < S; s++) {
    const values = Array.from({ length: R }, (_, r) => read(cells, state.statistic, place(state.t, s, r)));
    z.push(values.map(v => Number.isNaN(v) || (log && v <= 0) ? null : log ? Math.log10(v) : v));
    text.push(values.map((_, r) => plain(sentence(s, r))));
  }
  const count = palette().length - 1;
  const ticks = run.sources.map((_, i) => i), shorten = name => plain(name.length > 16 ? name.slice(0, 15) + "…" : name);
  const axis = (names, title) => ({ title: { text: title, standoff: 5 }, tickvals: names.length > 40 ? ticks.filter(i => i % Math.ceil(names.length / 25) === 0) : ticks,
    ticktext: (names.length > 40 ? names.filter((_, i) => i % Math.ceil(names.length / 25) === 0) : names).map(shorten), automargin: true, tickfont: { size: 9 } });
  Plotly.react(at("matrix"), [{
    type: "heatmap", z, text, hoverinfo: "text", zmin: log ? Math.log10(low) : low, zmax: log ? Math.log10(high) : high, showscale: false,
    colorscale: palette().filter((_, i) => i % 5 === 0).map((c, i) => [Math.min(1, i * 5 / count), c]),
  }], {
    height: Math.min(560, at("matrix").clientWidth + 40), margin: { l: 40, r: 5, t: 5, b: 40 }, font: { family: FONT, size: 11 }, dragmode: "zoom",
    xaxis: axis(run.targets, "class moved"), yaxis: { ...axis(run.sources, "step on class"), autorange: "reversed" }, uirevision: "matrix",
  }, { displayModeBar: false, responsive: true });
}

function drawScale() {
  const { low, high, log } = scale(), stops = palette().filter((_, i) => i % 15 === 0);
  const holder = at("scale");
  holder.replaceChildren(make("span", number(low)), make("span", "", { class: "bar" }), make("span", number(high)),
    make("span", `S_rel, ${run.statistics[state.statistic]}${log ? ", colours by ratio" : ""}${scale().diverging ? "; white is 1 (as much as the example itself), blue less, red more" : ""}; the same at every snapshot`, { class: "caption" }));
  holder.children[1].style.background = `linear-gradient(to right, ${stops.join(", ")})`;
}

function sentence(s, r) {
  const i = place(state.t, s, r), low = read(cells, state.statistic + "_low", i), high = read(cells, state.statistic + "_high", i);
  const range = Number.isNaN(low) ? (state.statistic === "mean" ? ", no interval" : "") : run.replicas ? ` (±1 SD: ${number(low)} to ${number(high)})` : ` [${number(low)}, ${number(high)}]`;
  const pairs = read(cells, "n_pairs", i), undefined_ = read(cells, "n_undefined", i);
  const count = Number.isNaN(pairs) ? "" : `; ${pairs} pairs${undefined_ > 0 ? `, ${undefined_} of them undefined` : ", none undefined"}`;
  const heavy = read(cells, "heavy_tailed", i) > 0 ? "; heavy-tailed (*): read the median" : "";
  return `A step on ${run.sources[s]} moved ${run.targets[r]}: ${number(read(cells, state.statistic, i))}${range}${count}${heavy}.`;
}
const describe = (s, r) => { at("cell").textContent = sentence(s, r); };

function pin(s, r) {
  state.pinned = !(state.pinned && state.s === s && state.r === r);
  [state.s, state.r] = [s, r];
  drawMatrix(); describe(s, r); drawCurves(); drawNumbers();
}

// ---- the curves -----------------------------------------------------------------------------------------------
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const blank = value => Number.isFinite(value) ? value : null;
const xs = () => state.axis === "epoch" ? run.epochs : run.steps;
const logS = () => scale().log;

function ribbon(x, low, high, floor) {
  // One closed polygon for each stretch without a gap: a gap must stay a gap.
  const px = [], py = [];
  for (let i = 0; i < T; i++) {
    const from = i;
    while (i < T && Number.isFinite(low[i]) && Number.isFinite(high[i])) i++;
    const span = Array.from({ length: i - from }, (_, j) => from + j);
    if (span.length < 2) continue;
    const back = [...span].reverse();
    px.push(...span.map(j => x[j]), ...back.map(j => x[j]), null);
    py.push(...span.map(j => high[j]), ...back.map(j => Math.max(low[j], floor)), null);
  }
  return [px, py];
}

function series(name, style, centre, low, high, panel) {
  const x = xs(), y = centre.map(blank), positive = centre.filter(v => v > 0);
  const floor = panel.log ? Math.min(...positive) / 3 : -Infinity;
  const axes = { xaxis: "x", yaxis: panel.y, legend: panel.legend, legendgroup: panel.y + name };
  const line = {
    ...axes, type: "scatter", mode: T > 60 ? "lines" : "lines+markers", name: plain(name), x, y, connectgaps: false,
    line: { color: style.color, dash: style.dash, width: style.width }, marker: { color: style.color, symbol: style.symbol, size: 5 },
    text: x.map((_, i) => `${plain(name)}: ${number(centre[i])}${Number.isNaN(low[i]) ? "" : ` [${number(low[i])}, ${number(high[i])}]`}`), hoverinfo: "text",
  };
  if (T === 1) return Number.isNaN(low[0]) ? [line] : [{ ...line, error_y: { type: "data", symmetric: false, array: [high[0] - centre[0]], arrayminus: [centre[0] - low[0]] } }];
  const [px, py] = ribbon(x, low, high, floor);
  const band = { ...axes, type: "scatter", mode: "lines", x: px, y: py, fill: "toself", fillcolor: style.color + (style.band || "2e"), line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  return px.length ? [band, line] : [line];
}

const over = (group, name, index) => Array.from({ length: T }, (_, t) => read(group, name, index(t)));
const own = { color: BLUE, dash: "solid", width: 2.6, symbol: "circle" };
const other = (i, band) => ({ band, color: OTHERS[i % OTHERS.length], dash: DASHES[i % DASHES.length], width: 1.7, symbol: MARKERS[i % MARKERS.length] });

function pairSeries(s, r, panel, style, name) {
  const index = t => place(t, s, r), k = state.statistic;
  return series(name, style, over(cells, k, index), over(cells, k + "_low", index), over(cells, k + "_high", index), panel);
}

function averageSeries(panel) {
  const index = t => look(t, state.u, state.d), none = Array(T).fill(NaN);
  const stored = state.statistic === "mean";
  const lines = [["intra", "own class (intra)", own], ["inter", "other classes (inter)", other(0)]];
  const found = lines.flatMap(([key, name, style]) => {
    if (stored) return series(name, style, ...["", "_low", "_high"].map(end => over(averages, key + end, index)), panel);
    return series(name, style, none.map((_, t) => averageOf(t, key === "intra", state.statistic)), none, none, panel);
  });
  if (!stored || !scale().heavy) return found;
  return [...found, ...lines.flatMap(([key, , style], i) => series(`median, ${i ? "others" : "own class"}`, { ...style, color: OTHERS[i ? 2 : 4], dash: "dot", width: 1.7, symbol: i ? "diamond-open" : "circle-open" },
    none.map((_, t) => averageOf(t, key === "intra", "median")), none, none, panel))];
}

function averageOf(t, diagonal, statistic) {
  let sum = 0, count = 0;
  for (let s = 0; s < S; s++) for (let r = 0; r < R; r++) {
    const value = read(cells, statistic, place(t, s, r));
    if (same(s, r) === diagonal && Number.isFinite(value)) { sum += value; count++; }
  }
  return count ? sum / count : NaN;
}

function mainSeries(panel) {
  const found = state.view === "averages" ? averageSeries(panel) : run.targets.flatMap((target, r) => {
    const s = Number(state.view);
    return pairSeries(s, r, panel, same(s, r) ? own : other(r, R > 5 ? "12" : "2e"), same(s, r) ? `${target} (own class)` : target);
  });
  if (!state.pinned) return found;
  const name = `picked: ${run.sources[state.s]} → ${run.targets[state.r]}`;
  return [...found, ...pairSeries(state.s, state.r, panel, { color: "#000000", dash: "solid", width: 2, symbol: "circle-open" }, name)];
}

function drawCurves() {
  const panels = run.panels, heights = [300, ...panels.map(() => 105)], gap = 58, bottom = 45;
  const total = heights.reduce((a, b) => a + b, 0) + gap * heights.length;
  lineTop = 1 - gap / total;
  const layout = {
    height: total + bottom, margin: { l: 58, r: 12, t: 4, b: bottom }, font: { family: FONT, size: 12 }, hovermode: "x", uirevision: state.axis,
    paper_bgcolor: "#fff", plot_bgcolor: "#fff", shapes: [marker()], hoverlabel: { namelength: -1 },
  };
  const traces = [];
  let top = total;
  heights.forEach((height, i) => {
    top -= gap;
    const n = i ? String(i + 1) : "", log = i === 0 && logS();
    const panel = { y: "y" + n, legend: "legend" + n, log };
    layout["yaxis" + n] = { domain: [(top - height) / total, top / total], title: { text: i ? plain(panels[i - 1].label) : `S<sub>rel</sub>`, standoff: 6 }, type: log ? "log" : "linear",
      gridcolor: "#eceff2", zeroline: false, linecolor: "#8b949e", showline: true, ticks: "outside", ticklen: 3, nticks: i ? 4 : 7, exponentformat: "power", automargin: true };
    layout["legend" + n] = { orientation: "h", x: 0, xanchor: "left", y: top / total, yanchor: "bottom", yref: "paper", font: { size: 11 }, itemwidth: 40 };
    traces.push(...(i ? panels[i - 1].names.flatMap((name, j) => scalarSeries(name, j, panel)) : mainSeries(panel)));
    top -= height;
  });
  layout.xaxis = { title: { text: state.axis === "epoch" ? "epoch" : "training step", standoff: 6 }, anchor: "y" + (heights.length > 1 ? heights.length : ""), type: state.axis === "log" ? "log" : "linear",
    gridcolor: "#eceff2", zeroline: false, linecolor: "#8b949e", showline: true, ticks: "outside", ticklen: 3, showspikes: false };
  Plotly.react(at("curves"), traces, layout, { displayModeBar: false, responsive: true });
}

function scalarSeries(name, i, panel) {
  const index = t => t;
  return series(name, i ? other(i - 1) : own, over(scalars, name, index), over(scalars, name + "_low", index), over(scalars, name + "_high", index), panel);
}

let lineTop = 1;
function marker() {
  const x = xs()[state.t];
  return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: lineTop, line: { color: "#444", width: 1.2, dash: "dot" }, layer: "above", visible: !(state.axis === "log" && x <= 0) };
}
let waiting = false;
function moveMarker() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; Plotly.relayout(at("curves"), { shapes: [marker()] }); });
}

// ---- the words ------------------------------------------------------------------------------------------------
function drawReadout() {
  const parts = [["step", String(run.steps[state.t]), ""]];
  if (run.epochs) parts.push(["epoch", run.epochs[state.t].toFixed(2), ""]);
  for (const name of run.scalar_names) parts.push([name, number(read(scalars, name, state.t)), /^(probe_)?(loss|accuracy)$/.test(name) ? "" : "minor"]);
  if (scalars.seconds) parts.push(["look took", `${number(read(scalars, "seconds", state.t))} s`, "minor"]);
  at("readout").replaceChildren(...parts.map(([name, value, kind]) => {
    const span = make("span", `${name} `, { class: kind, "data-name": name });
    span.append(make("b", value));
    return span;
  }));
  at("step").setAttribute("aria-valuetext", `step ${run.steps[state.t]}, ${state.t + 1} of ${T}`);
}

function drawWords() {
  const notes = run.notes[state.u][state.d];
  at("answer").textContent = notes.answer;
  at("words").textContent = `${run.definitions[state.d]}: ${run.words[state.d]}`;
  const warnings = [...run.general, ...notes.warnings];
  at("warnings").replaceChildren(...warnings.map(text => make("li", text)));
  at("warnings-section").hidden = warnings.length === 0;
  at("band").textContent = `${state.statistic === "mean" || run.replicas ? run.band[0].toUpperCase() + run.band.slice(1) : "No interval is stored for this statistic"}. ` +
    "The dotted line is the snapshot of the matrix. Drag to zoom, double-click to zoom out; pick a cell of the matrix to add its curve.";
}

const COLUMNS = [["mean", "mean"], ["low", "mean_low"], ["high", "mean_high"], ["median", "median"], ["ratio of means", "ratio_of_means"], ["pairs", "n_pairs"], ["undefined", "n_undefined"], ["heavy-tailed", "heavy_tailed"]];
const cellText = (name, i) => {
  const value = read(cells, name, i);
  if (name === "heavy_tailed") return value > 0 ? "yes" : "no";
  return name.startsWith("n_") && Number.isFinite(value) ? String(value) : number(value);
};

function drawNumbers() {
  const [head, body] = [at("numbers").tHead, at("numbers").tBodies[0]];
  if (!head.rows.length) head.insertRow().append(...["step on", "moved", ...COLUMNS.map(c => c[0])].map(name => make("th", name, { scope: "col" })));
  const sources = small ? run.sources.map((_, s) => s) : [state.s];
  body.replaceChildren(...sources.flatMap(s => run.targets.map((target, r) => {
    const row = make("tr", null), i = place(state.t, s, r);
    row.append(make("td", run.sources[s]), make("td", target), ...COLUMNS.map(([, name]) => make("td", cellText(name, i), { class: "n" })));
    return row;
  })));
  at("numbers-note").textContent = `${run.definitions[state.d]}, ${run.updates[state.u]}, step ${run.steps[state.t]}` +
    (small ? "." : `; only steps on ${run.sources[state.s]} (pick another row in the matrix).`);
}

function csv() {
  const quote = text => /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  const raw = value => Number.isNaN(value) ? "" : String(value);
  const lines = [["step", "update", "definition", "source_class", "target_class", ...COLUMNS.map(c => c[1])].join(",")];
  for (let t = 0, i = 0; t < T; t++) for (const u of run.updates) for (const d of run.definitions)
    for (const s of run.sources) for (const r of run.targets) {
      lines.push([run.steps[t], ...[u, d, s, r].map(quote), ...COLUMNS.map(([, name]) => raw(read(cells, name, i)))].join(","));
      i++;
    }
  return URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
}

// ---- the controls ---------------------------------------------------------------------------------------------
function atStep() { drawReadout(); drawMatrix(); describe(state.s, state.r); drawNumbers(); moveMarker(); }
function everything() { drawReadout(); drawWords(); drawMatrix(); drawScale(); describe(state.s, state.r); drawNumbers(); drawCurves(); }
const options = (select, pairs) => at(select).replaceChildren(...pairs.map(([value, text]) => make("option", text, { value })));

let timer = null;
function play() {
  const button = at("play"), stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; button.setAttribute("aria-pressed", "false"); };
  if (timer) return stop();
  if (state.t === T - 1) state.t = -1;
  button.textContent = "Pause"; button.setAttribute("aria-pressed", "true");
  timer = setInterval(() => {
    state.t += 1;
    at("step").value = state.t;
    atStep();
    if (state.t >= T - 1) stop();
  }, Math.max(60, Math.min(400, 9000 / T)));
}

options("view", [["averages", "own class against others"], ...(small ? run.sources.map((name, s) => [s, `step on ${name}`]) : [])]);
options("axis", [...(run.epochs ? [["epoch", "epoch"]] : []), ["step", "training step"], ["log", "training step, logarithmic"]]);
at("step").addEventListener("input", event => { state.t = Number(event.target.value); atStep(); });
at("definition").addEventListener("change", event => { state.d = event.target.selectedIndex; everything(); });
at("update").addEventListener("change", event => { state.u = event.target.selectedIndex; everything(); });
at("statistic").addEventListener("change", event => { state.statistic = event.target.value; everything(); });
at("view").addEventListener("change", event => { state.view = event.target.value; drawCurves(); });
at("axis").addEventListener("change", event => { state.axis = event.target.value; drawCurves(); });
at("play").addEventListener("click", play);
at("play").disabled = T < 2;
at("step").disabled = T < 2;
at("csv").addEventListener("click", event => { event.currentTarget.href = csv(); });
at("step").value = state.t;
at("columns").classList.toggle("even", Math.max(S, R) > 5);
if (small) buildTable();
everything();
if (!small) at("matrix").on("plotly_click", event => pin(event.points[0].pointIndex[0], event.points[0].pointIndex[1]));
document.documentElement.dataset.ready = "true";
})();
