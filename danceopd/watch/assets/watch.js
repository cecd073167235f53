"use strict";
// Draws what the server reads of the runs: charts by uPlot, the rest by the page's own elements. It asks again every
// two seconds, and for a run's numbers only where its version changed.

const SECONDS = 2;
const COLOURS = {
  light: ["#24598f", "#c1571b", "#2c7a46", "#8a3f9e", "#a8323e", "#5b6b12", "#0f7b83", "#7a5230"],
  dark: ["#82b5ea", "#f0a36b", "#7fd09b", "#d39be6", "#f08f98", "#c3d06a", "#6fd3da", "#d3ab85"],
};
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 6], [1, 6]];
const CHARTS = [
  { id: "loss", title: "Loss by capability", pick: (name) => name.startsWith("loss/"), log: true },
  { id: "closed", title: "Gap closed: 1 − loss / loss at the beginning", closed: true, percent: true },
  { id: "scores", title: "Scores", from: "evaluations", pick: () => true },
  { id: "gradient", title: "Gradient norm", pick: (name) => name === "gradient_norm", log: true },
  { id: "speed", title: "Samples a second", pick: (name) => name === "samples_per_second" },
  { id: "memory", title: "Memory, GiB", pick: (name) => name === "peak_memory_gib" },
  { id: "mfu", title: "MFU", pick: (name) => name === "mfu", percent: true },
  { id: "rate", title: "Learning rate", pick: (name) => name === "learning_rate" },
];

const runs = new Map(); // name -> {summary, data, colour, shown, files}
const plots = new Map(); // chart id -> {plot, figure}
const dark = matchMedia("(prefers-color-scheme: dark)");
const $ = (id) => document.getElementById(id);
let axis = "steps";
let followed = true; // the slider stays at the newest sample until it is moved

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function colour(run) {
  return COLOURS[dark.matches ? "dark" : "light"][run.number % 8];
}

// The end of a run's folder that tells it from the other runs.
function short(run) {
  const parts = run.name.split("/").filter(Boolean);
  for (let count = 1; count < parts.length; count += 1) {
    const end = parts.slice(-count).join("/");
    if ([...runs.keys()].filter((name) => name === end || name.endsWith(`/${end}`)).length === 1) return end;
  }
  return run.name;
}

function number(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function phrase(summary) {
  const of = summary.max_steps ? ` of ${summary.max_steps.toLocaleString("en")}` : "";
  const at = `update ${summary.step.toLocaleString("en")}${of}`;
  const when = summary.changed ? `, last line ${ago(Date.now() / 1000 - summary.changed)}` : "";
  return {
    waiting: "has not made an update yet", finished: `finished, ${at}`, stopped: `stopped, ${at}${when}`,
    training: `training, ${at}`, gone: "its folder is gone; what was read of it stays here",
  }[summary.state];
}

const chosen = () => [...runs.values()].filter((run) => run.shown && run.data);

// ------------------------------------------------------------------------------------------------- what is asked

async function ask(path, parameters = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer;
}

async function refresh() {
  let summaries;
  try {
    summaries = await (await ask("api/runs")).json();
  } catch {
    $("headline").textContent = "danceopd watch does not answer any more; start it again. What was read stays here.";
    return;
  }
  let changed = false;
  for (const summary of summaries) {
    if (!runs.has(summary.name)) {
      runs.set(summary.name, { name: summary.name, number: runs.size, shown: runs.size < 4 });
      changed = true;
    }
    const run = runs.get(summary.name);
    run.summary = summary;
    const kept = summary.state === "gone" && run.data; // a deleted run is still looked at
    if (run.shown && !kept && run.version !== summary.version) {
      try {
        run.data = await (await ask("api/run", { run: run.name })).json();
        run.version = run.data.version;
        changed = true;
      } catch { /* it is asked again in two seconds */ }
    }
  }
  list();
  if (changed) draw();
}

// ------------------------------------------------------------------------------------------------- what is shown

function list() {
  const all = [...runs.values()];
  const training = all.filter((run) => run.summary.state === "training");
  $("headline").textContent = all.length === 1
    ? `${short(all[0])}: ${phrase(all[0].summary)}.`
    : `${all.length} runs, ${training.length} training${training.length ? `: ${training.map(short).join(", ")}` : ""}.`;
  for (const run of all) {
    if (!run.label) {
      const box = element("input", { type: "checkbox", checked: run.shown });
      box.addEventListener("change", () => { run.shown = box.checked; refresh(); draw(); });
      run.dot = element("span", { className: "dot" });
      run.state = element("span", { className: "state" });
      run.label = element("label", {}, box, run.dot, element("span", { textContent: short(run), title: run.name }), run.state);
      $("runs").append(run.label);
    }
    run.dot.style.background = colour(run);
    if (run.state.textContent !== phrase(run.summary)) run.state.textContent = phrase(run.summary);
  }
}

function draw() {
  warnings();
  samples();
  CHARTS.forEach(chart);
  queries();
  files();
}

function warnings() {
  const lines = [];
  for (const run of chosen()) {
    const of = runs.size > 1 ? `${short(run)}, ` : "";
    for (const [step, text] of run.data.warnings) lines.push(`${of}update ${step}: ${text}`);
    if (run.data.unreadable) lines.push(`${of}lines of log.jsonl that cannot be read and are left out: ${run.data.unreadable}`);
  }
  $("warnings").hidden = !lines.length;
  $("warnings").querySelector("ul").replaceChildren(...lines.slice(-50).map((text) => element("li", { textContent: text })));
}

// All steps that a chosen run has a grid of; the slider moves over them.
function steps() {
  return [...new Set(chosen().flatMap((run) => run.data.samples))].sort((a, b) => a - b);
}

const loaded = new Map(); // address -> Image that is there already

function picture(run, step) {
  const address = `api/sample?${new URLSearchParams({ run: run.name, step })}`;
  if (!loaded.has(address)) {
    if (loaded.size > 400) loaded.clear();
    loaded.set(address, element("img", { src: address, decoding: "async" }));
  }
  return loaded.get(address);
}

function samples() {
  const all = steps();
  $("pictures").hidden = !all.length;
  if (!all.length) return;
  const slider = $("step");
  slider.max = all.length - 1;
  if (followed) slider.value = all.length - 1;
  grids();
}

function grids() {
  const all = steps(), at = Number($("step").value), step = all[at];
  $("step-shown").textContent = step.toLocaleString("en");
  $("step").setAttribute("aria-valuetext", `update ${step}`);
  const figures = [];
  for (const run of chosen()) {
    const own = run.data.samples.filter((one) => one <= step).pop();
    if (own === undefined) continue;
    const image = picture(run, own);
    image.alt = `sample grid of ${short(run)} at update ${own}: the student's pictures, and its sources' below each row`;
    figures.push(element("figure", {}, image, element("figcaption", { textContent: `${short(run)}, update ${own}` })));
  }
  $("grids").replaceChildren(...figures);
  for (const near of [at - 1, at + 1, at + 2]) { // so that a move shows at once
    for (const run of chosen()) if (run.data.samples.includes(all[near])) picture(run, all[near]);
  }
}

// ------------------------------------------------------------------------------------------------- charts

function across(run, part) {
  const { steps, columns } = run.data[part];
  if (axis === "steps") return steps;
  const training = run.data.training;
  const other = training.columns[axis === "hours" ? "seconds" : "network_evaluations"];
  if (!other) return steps.map(() => null);
  if (axis === "evaluations" && columns.network_evaluations) return columns.network_evaluations;
  let i = 0;
  return steps.map((step) => {
    while (i < training.steps.length - 1 && training.steps[i] < step) i += 1;
    return step === 0 ? 0 : other[i] == null ? null : axis === "hours" ? other[i] / 3600 : other[i];
  });
}

function closed(values) {
  const there = values.filter((value) => value != null);
  const first = there.slice(0, Math.max(3, Math.ceil(there.length / 50)));
  const begin = first.reduce((a, b) => a + b, 0) / first.length;
  let mean = begin; // a running mean, as a single update's loss says little
  return values.map((value) => (value == null || !begin ? null : 1 - (mean += (value - mean) / 12) / begin));
}

function lines(chart) {
  const found = [];
  for (const run of chosen()) {
    const part = chart.from ?? "training", { columns } = run.data[part];
    const pick = chart.closed ? (name) => name.startsWith("loss/") : chart.pick;
    const names = Object.keys(columns).sort().filter(pick);
    names.forEach((name, i) => {
      const values = chart.closed ? closed(columns[name]) : columns[name];
      const part_of = names.length > 1 || chart.from ? name.replace("loss/", "").replaceAll("_", " ") : "";
      found.push({ run, part_of, x: across(run, part), y: values, dash: DASHES[i % DASHES.length] });
    });
  }
  return found;
}

function joined(found) {
  const usable = found.map(({ x, y }) => {
    const kept = [[], []];
    x.forEach((at, i) => {
      if (at != null && (!kept[0].length || at > kept[0].at(-1))) { kept[0].push(at); kept[1].push(y[i]); }
    });
    return kept;
  });
  return uPlot.join(usable);
}

function chart(chart) {
  const found = lines(chart).filter(({ y }) => y.some((value) => value != null));
  const before = plots.get(chart.id);
  before?.plot.destroy();
  before?.figure.remove();
  plots.delete(chart.id);
  if (!found.length) return;
  const name = (line) => [chosen().length > 1 && short(line.run), line.part_of].filter(Boolean).join(": ");
  const last = (line) => line.y.findLast((value) => value != null);
  const shown = (value) => (chart.percent ? `${(100 * value).toFixed(1)} %` : number(value));
  const summary = found.map((line) => `${name(line)} ${shown(last(line))}`.trim()).join(", ");
  const place = element("div", { role: "img" });
  place.setAttribute("aria-label", `${chart.title}, the last values: ${summary}`);
  const key = element("ul", { className: "key" });
  for (const line of found) {
    const mark = element("i");
    mark.style.borderColor = colour(line.run);
    mark.style.borderTopStyle = line.dash.length ? "dashed" : "solid";
    key.append(element("li", {}, mark, name(line)));
  }
  const figure = element("figure", { id: `chart-${chart.id}` },
    element("h3", { textContent: chart.title }),
    element("p", { className: "last", textContent: `Last: ${summary}` }), place, found.length > 1 ? key : "");
  const after = CHARTS.slice(CHARTS.indexOf(chart) + 1).map(({ id }) => $(`chart-${id}`)).find(Boolean) ?? $("chart-queries");
  $("charts").insertBefore(figure, after ?? null);
  const style = getComputedStyle(document.body), ink = style.color;
  const grid = getComputedStyle(figure).borderTopColor;
  const log = chart.log && found.every(({ y }) => y.every((value) => value == null || value > 0));
  const axes = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui" };
  const plot = new uPlot({
    width: Math.max(200, place.clientWidth), height: 230, legend: { show: false }, cursor: { y: false },
    scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [
      { ...axes, values: (_, marks) => marks.map((mark) => (mark == null ? "" : compact(mark))) },
      { ...axes, size: 62, values: (_, marks) => marks.map((mark) => (mark == null ? "" : chart.percent ? `${Math.round(100 * mark)} %` : number(mark))) },
    ],
    series: [{}, ...found.map((line) => ({
      label: name(line), stroke: colour(line.run), width: 1.6, dash: line.dash, spanGaps: true,
      points: { show: line.y.filter((value) => value != null).length < 20 },
    }))],
  }, joined(found), place);
  plots.set(chart.id, { plot, figure, place });
}

function compact(value) {
  return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
}

// How often each noise level was asked, of a whole run.
function queries() {
  $("chart-queries")?.remove();
  const found = chosen().filter((run) => Object.keys(run.data.health.queries ?? {}).length);
  if (!found.length) return;
  const figure = element("figure", { id: "chart-queries" }, element("h3", { textContent: "Queries by noise level" }));
  for (const run of found) {
    const counts = Object.entries(run.data.health.queries).sort((a, b) => b[0] - a[0]);
    const most = Math.max(...counts.map(([, count]) => count)), all = counts.reduce((sum, [, count]) => sum + count, 0);
    figure.append(element("p", { className: "last", textContent: `${short(run)}: ${all.toLocaleString("en")} queries; σ = 1 is noise` }));
    const bars = element("div", { className: "bars" });
    for (const [sigma, count] of counts) {
      const meter = element("meter", { min: 0, max: most, value: count });
      meter.setAttribute("aria-label", `${count} queries at noise level ${sigma}`);
      const texts = [`σ ${sigma}`, `${((100 * count) / all).toFixed(1)} %`].map((textContent) => element("span", { textContent }));
      bars.append(texts[0], meter, texts[1]);
    }
    figure.append(bars);
  }
  $("charts").append(figure);
}

// ------------------------------------------------------------------------------------------------- files

function files() {
  for (const run of chosen()) {
    if (run.files) continue;
    run.files = element("div");
    for (const [path, title] of [["api/log", "the end of log.jsonl"], ["api/config", "config.yaml"]]) {
      const text = element("pre", { tabIndex: 0 });
      text.setAttribute("aria-label", `${short(run)}, ${title}`);
      const more = element("details", {}, element("summary", { textContent: `${short(run)}: ${title}` }), text);
      more.addEventListener("toggle", async () => {
        if (!more.open) return;
        text.textContent = await (await ask(path, { run: run.name })).text() || "(nothing there)";
        text.scrollTop = path === "api/log" ? text.scrollHeight : 0;
      });
      run.files.append(more);
    }
    $("files").append(run.files);
  }
  for (const run of runs.values()) if (run.files) run.files.hidden = !run.shown;
}

// ------------------------------------------------------------------------------------------------- begin

$("step").addEventListener("input", () => {
  followed = Number($("step").value) === Number($("step").max);
  grids();
});
$("axis").addEventListener("change", (event) => { axis = event.target.value; CHARTS.forEach(chart); });
dark.addEventListener("change", () => { list(); draw(); });
new ResizeObserver(() => {
  for (const { plot, place } of plots.values()) {
    const width = Math.max(200, place.clientWidth);
    if (width !== plot.width) plot.setSize({ width, height: 230 });
  }
}).observe($("charts"));

(async () => {
  for (;;) {
    await refresh();
    await new Promise((after) => setTimeout(after, 1000 * SECONDS));
  }
})();
