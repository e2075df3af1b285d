"use strict";
// Draws the page from the JSON in #data. Whatever comes from a run goes into the page as a text
// node (`el`) or onto a canvas (uPlot), never as markup; the policy in <head> forbids markup too.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const many = runs.length > 1;
const STAGE_NAMES = {
  update_weights: "weights into the engine", probe: "check of the weights", gen: "generating", reward: "waiting for scores",
  adv: "advantages, packing", ref: "reference log-probs", old_log_prob: "old log-probs",
  update_actor: "updating the policy", self_check: "check of shared prompts", save_checkpoint: "saving checkpoints", testing: "evaluating",
};
const CURRICULUM = [
  "prompts", "passes", "seen", "their reward", "without reward", "new drawn", "solved", "trained on",
  "carried drawn", "solved", "trained on",
];

// --- small helpers ---------------------------------------------------------------------

/** An element; `attributes` are ours, children are elements or become text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined)
    .map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function add(id, ...children) {
  document.getElementById(id).append(...children.filter(Boolean));
}

function table(head, rows, kind = "") {
  const cell = (tag) => (value) => (value instanceof Node && /^T[HD]$/.test(value.tagName)
    ? value : el(tag, {}, value));
  const header = el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)));
  return el("div", { class: "scroll" }, el("table", kind ? { class: kind } : {},
    el("thead", {}, header),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td")))))));
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(digits));
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const points = (share) => (100 * share).toFixed(1);
const signed = (share) => (share >= 0 ? "+" : "−") + points(Math.abs(share));

/** A colour of page.css as it is now, light or dark; by name, or by a line's number. */
function color(name) {
  const property = Number.isInteger(name) ? `--c${name % 8}` : `--${name}`;
  return getComputedStyle(document.documentElement).getPropertyValue(property).trim();
}

/** A run's name with the dot of its colour in the curves. */
function runName(label) {
  if (!many) return el("span", {}, label);
  const dot = el("span", { class: "run", "aria-hidden": "true" });
  dot.style.background = `var(--c${runs.findIndex((run) => run.label === label) % 8})`;
  return el("span", {}, dot, label);
}

// --- summary -----------------------------------------------------------------------------

function summary() {
  const money = data.rate !== null;
  const judged = runs.some((run) => run.judge);
  const forked = runs.some((run) => run.parent);
  const rows = runs.map(({ label, status, command, parent, steps_done, steps_planned, judge, cost, folder }) => [
    ["run", runName(label)], ["status", status], ["command", command ? `qlrl ${command}` : "–"],
    ...(forked ? [["started from", parent ?? "–"]] : []),
    ["steps", steps_planned ? `${steps_done} of ${steps_planned}` : steps_done],
    ["time on record", duration(cost.seconds)],
    ["hours", `${number(cost.hours)} ${cost.unit}-hours`], ["tokens", number(cost.tokens)],
    ...(judged ? [["judge", judge ?? "–"]] : []),
    ...(money ? [[`money at ${data.rate} an hour`, number(cost.money)]] : []), ["folder", folder],
  ]);
  if (many) {
    const texts = rows.map((facts) => facts.map(([, value]) => value));
    add("summary", table(rows[0].map(([name]) => name), texts, "words"), notes());
    return add("summary", stagesOfRuns());
  }
  const facts = rows[0].flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  return add("summary", el("div", { class: "cards" },
    el("div", { class: "card" }, el("dl", { class: "facts" }, ...facts), notes()), costTable(runs[0])));
}

/** What could not be read or is not shown. */
function notes() {
  const labels = new Map();  // the runs that have a note
  for (const run of runs) {
    for (const note of run.notes) labels.set(note, [...(labels.get(note) ?? []), run.label]);
  }
  const texts = [...labels].map(([note, own]) => (own.length === runs.length ? note : `${own.join(", ")}: ${note}`));
  return texts.length ? el("ul", { class: "notes" }, ...texts.map((text) => el("li", {}, text))) : null;
}

function stagesOfRuns() {
  const stages = [...new Set(runs.flatMap((run) => run.cost.stages.map(([stage]) => stage)))];
  if (!stages.length) return null;
  return el("div", {}, el("h3", {}, "Hours by stage"),
    table(["run", ...stages.map((stage) => STAGE_NAMES[stage] || stage)], runs.map((run) => {
      const hours = Object.fromEntries(run.cost.stages.map(([stage, , value]) => [stage, value]));
      return [runName(run.label), ...stages.map((stage) => number(hours[stage], 3))];
    })));
}

function costTable({ cost }) {
  if (!cost.stages.length) return el("div", {});
  const stages = [...cost.stages].sort((a, b) => b[2] - a[2]);
  const rows = stages.map(([stage, seconds, hours]) => {
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    const share = cost.hours ? hours / cost.hours : 0;
    bar.style.width = `${4 * share}rem`;
    const row = [STAGE_NAMES[stage] || stage, duration(seconds), number(hours, 3)];
    if (cost.money !== null) row.push(number(hours * data.rate, 3));
    return [...row, `${points(share)} %`, bar];
  });
  const head = ["stage", "time", "hours", ...(cost.money !== null ? ["money"] : []), "share", ""];
  return el("div", { class: "card" }, el("h3", {}, `${cost.unit}-hours by stage`), table(head, rows));
}

// --- evaluation ----------------------------------------------------------------------------

function evaluation() {
  const { benchmarks, rows } = data.evaluations;
  if (!rows.length) return add("evaluation", el("p", { class: "faint" }, "No evaluation yet."));
  const head = [...(many ? ["run"] : []), "evaluation", ...benchmarks, ...(benchmarks.length > 1 ? ["mean"] : [])];
  const score = (cell) => {
    if (cell === null) return "–";
    return `${points(cell[0])}${cell[1] === null ? "" : ` ± ${points(cell[1])}`}`;
  };
  add("evaluation",
    el("p", { class: "faint" }, "Score of 100 ± its standard error over questions."),
    table(head, rows.map((row) => [
      ...(many ? [runName(row.run)] : []), row.name,
      ...row.cells.slice(0, head.length - (many ? 2 : 1)).map(score),
    ])));
  if (data.differences.length) differences(benchmarks);
  if (data.evaluations.more.length) figures(data.evaluations);
  if (data.published) published(data.published);
}

function published({ source, columns, rows }) {
  add("evaluation", el("details", {}, el("summary", {}, `From the paper, not measured here (${source})`),
    el("div", {}, table(["model", ...columns, "mean"], rows.map(([model, ...scores]) => [
      model, ...scores.map((score) => (score === null ? "–" : score.toFixed(1)))])))));
}

/** What else the evaluations say: pass@k, scores by length, cut prompts and the like. */
function figures({ figures: names, more }) {
  add("evaluation", el("details", {}, el("summary", {}, "Other figures of each evaluation"),
    el("div", {}, table([...(many ? ["run"] : []), "evaluation", "benchmark", ...names],
      more.map(({ run, name, benchmark, values }) => [
        ...(many ? [runName(run)] : []), name, benchmark, ...values.map((value) => number(value, 3)),
      ])))));
}

function differences(benchmarks) {
  const names = [...benchmarks, ...(benchmarks.length > 1 ? ["mean"] : [])];
  const cell = (result) => {
    if (!result) return el("td", {}, "–");
    const [difference, low, high, p] = result.numbers;
    const kind = !result.told_apart ? "faint" : difference > 0 ? "good" : "bad";
    return el("td", { class: kind, title: `p=${number(p, 2)}, ${result.items} questions` },
      `${signed(difference)} [${signed(low)}, ${signed(high)}]`);
  };
  add("evaluation", el("h3", {}, "Differences"),
    el("p", { class: "faint" },
      "Paired by question, 95 % interval. What is grey cannot be told apart from 0. ",
      "The interval is about questions and samples, not about training."),
    table(["", "minus", ...names], data.differences.map((row) => [
      row.second, row.first,
      ...(row.problem ? [el("td", { colspan: names.length }, row.problem)]
        : names.map((name) => cell(row.cells[name]))),
    ])));
}

// --- curves --------------------------------------------------------------------------------

const drawn = [];  // what to draw again in other colours

/** The lines of a chart: [label, colour number, x, y, dash]. */
function lines(chart, window) {
  return runs.flatMap((run, r) => chart.metrics.flatMap((metric, m) => {
    const { x, y } = run.curves[chart.kind];
    if (!y[metric]) return [];
    const name = short(metric, chart.metrics);
    const steps = x.map((step) => step + run.first_step);
    return [[many ? `${run.label}` : name, many ? r : m, steps, smooth(y[metric], window)]];
  }));
}

/** A metric's name without what all of the chart have in common. */
function short(metric, metrics) {
  if (metrics.length === 1) return metric;
  let start = 0;
  let end = 0;
  const parts = metrics.map((name) => name.split("/"));
  const least = Math.min(...parts.map((p) => p.length));
  while (start < least - 1 && parts.every((p) => p[start] === parts[0][start])) start += 1;
  while (end < least - start - 1 && parts.every((p) => p.at(-1 - end) === parts[0].at(-1 - end))) end += 1;
  const own = metric.split("/");
  return own.slice(start, own.length - end).join("/") || metric;
}

function smooth(values, window) {
  if (window <= 1) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - window + 1), i + 1).filter((v) => v !== null);
    return near.reduce((sum, v) => sum + v, 0) / near.length;
  });
}

/** Phase boundaries and stability events, drawn under the lines. */
function marks(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui`;
  ctx.textAlign = "left";
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  const inside = (x) => x >= bbox.left && x <= bbox.left + bbox.width;
  ctx.strokeStyle = ctx.fillStyle = color("faint");
  const seen = new Set();
  for (const [start, name] of runs.flatMap((run) => run.phases.map((phase) => [phase.start + run.first_step, phase.name]))) {
    const key = `${start} ${name}`;
    const x = Math.round(plot.valToPos(start - 0.5, "x", true));
    if (seen.has(key)) continue;
    seen.add(key);
    if (start > 0 && inside(x)) {
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(name, x + 4 * devicePixelRatio, bbox.top + 12 * devicePixelRatio);
    }
  }
  ctx.fillStyle = color("bad");
  for (const step of runs.flatMap((run) => run.events.map(([own]) => own + run.first_step))) {
    const x = plot.valToPos(step, "x", true);
    const size = 4 * devicePixelRatio;
    if (!inside(x)) continue;
    ctx.beginPath();
    ctx.moveTo(x - size, bbox.top);
    ctx.lineTo(x + size, bbox.top);
    ctx.lineTo(x, bbox.top + 2 * size);
    ctx.fill();
  }
  ctx.restore();
}

/** Bounds of the y axis; uPlot's own go from 0 to 100 where all values are 0. */
function range(low, high) {
  if (low === null || (low === 0 && high === 0)) return [0, 1];
  return uPlot.rangeNum(low, high, 0.1, true);
}

function draw(card, chart, window) {
  const shown = lines(chart, window);
  const [faint, grid] = [color("faint"), color("line")];
  const axis = { stroke: faint, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
  const few = shown.every(([, , x]) => x.length < 40);
  const series = shown.map(([label, index]) => ({
    label, stroke: color(index), width: 1.7, spanGaps: true,
    dash: index >= 8 ? [6, 3] : undefined,
    points: { show: few, size: 5, fill: color(index) },
    value: (_, value) => number(value),
  }));
  const options = {
    width: card.clientWidth - 28, height: 210, series: [{ label: "step", value: (_, v) => number(v) }, ...series],
    scales: { x: { time: false }, y: { range: (_, low, high) => range(low, high) } }, cursor: { points: { size: 7 } },
    axes: [
      { ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000], size: 32 },
      { ...axis, size: 64, values: (_, ticks) => ticks.map((tick) => number(tick, 3)) },
    ],
    hooks: { drawAxes: [marks] },
  };
  const aligned = uPlot.join(shown.map(([, , x, y]) => [x, y]));
  card.querySelector(".uplot")?.remove();
  const plot = new uPlot(options, aligned, card);
  card.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const x = plot.data[0];
    const at = Math.min(Math.max((plot.cursor.idx ?? x.length) + step, 0), x.length - 1);
    plot.setCursor({ left: plot.valToPos(x[at], "x"), top: 5 });
  };
  return plot;
}

function curves() {
  // Several runs have the colours, so each metric gets a chart of its own.
  const charts = many
    ? data.charts.flatMap((chart) => chart.metrics.map((metric) => ({
      ...chart, metrics: [metric],
      title: chart.metrics.length > 1 ? `${chart.title}: ${short(metric, chart.metrics)}` : chart.title,
    })))
    : data.charts;
  if (!charts.length) return add("curves", el("p", { class: "faint" }, "No step yet."));
  const select = el("select", {}, ...[1, 5, 20, 100].map((n) => (
    el("option", { value: n }, n === 1 ? "none" : `mean of ${n} points`))));
  const grid = el("div", { class: "cards" });
  add("curves", el("form", {}, el("label", {}, "Smoothing", select)),
    el("p", { class: "faint" }, "Dashed: a phase begins. Red: a stability rule fired. Drag to zoom, ",
      "double click to zoom out; in a chart, ← and → move the cursor.",
      runs.some((run) => run.first_step) ? " A run that started from another one begins at that one's step." : null),
    grid, events());
  for (const chart of charts) {
    const card = el("div", { class: "card", tabindex: "0", role: "group", "aria-label": label(chart) },
      el("h3", {}, chart.title));
    grid.append(card);
    drawn.push({ card, chart, plot: null });
  }
  const again = () => {
    for (const item of drawn) item.plot = draw(item.card, item.chart, Number(select.value));
  };
  again();
  select.addEventListener("change", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) for (const { plot, card } of drawn) plot.setSize({ width: card.clientWidth - 28, height: 210 });
    width = innerWidth;
  });
}

/** What a chart says to those who do not see it. */
function label(chart) {
  const ends = lines(chart, 1).map(([name, , , y]) => {
    const values = y.filter((v) => v !== null);
    return `${name} from ${number(values[0])} to ${number(values.at(-1))}`;
  });
  return `${chart.title}: ${ends.join(", ")}`;
}

function events() {
  const rows = runs.flatMap((run) => run.events.map(([step, what, count]) => [
    ...(many ? [runName(run.label)] : []), step, what, count]));
  if (!rows.length) return el("p", { class: "faint" }, "No stability rule fired.");
  return el("details", {}, el("summary", {}, `${rows.length} stability events`),
    el("div", {}, table([...(many ? ["run"] : []), "step", "what", "times"], rows)));
}

// --- curriculum ----------------------------------------------------------------------------

function curriculum() {
  const rows = runs.flatMap((run) => run.phases.map((phase) => [
    ...(many ? [runName(run.label)] : []), phase.name, number(phase.max_input_tokens),
    `${phase.steps_done} of ${phase.steps}`, duration(phase.seconds),
    phase.reward.map((value) => number(value, 3)).join(" → "),
    ...phase.curriculum.map((value) => number(value, 3)),
  ]));
  if (!rows.length) return add("curriculum", el("p", { class: "faint" }, "No phases."));
  add("curriculum",
    el("p", { class: "faint" }, "Counts of prompts since the phase began. New prompts are the phase's own; ",
      "carried ones come from an earlier phase. Solved: some response had a reward."),
    table([...(many ? ["run"] : []), "phase", "up to tokens", "steps", "time", "reward", ...CURRICULUM], rows));
}

// --- samples -------------------------------------------------------------------------------

const SCORES = {
  all: () => true, "right (1)": (s) => s.score === 1, "wrong (0)": (s) => s.score === 0,
  between: (s) => s.score > 0 && s.score < 1, "no verdict": (s) => s.score === null,
  "rule and judge differ": (s) => s.judge !== null && s.judge !== s.rule,
  unfinished: (s) => s.finished === false,
};
const PAGE = 20;

function samples() {
  const everything = runs.flatMap((run) => run.samples.map((sample) => ({ ...sample, run: run.label })));
  if (!everything.length) return add("samples", el("p", { class: "faint" }, "No rollout log."));
  const choices = (name) => ["all", ...new Set(everything.map((sample) => String(sample[name])))];
  const select = (id, name, options) => el("label", {}, name,
    el("select", { id }, ...options.map((option) => el("option", {}, option))));
  const steps = choices("step").sort((a, b) => b - a);
  const form = el("form", {},
    many ? select("filter-run", "Run", choices("run")) : null,
    select("filter-score", "Score", Object.keys(SCORES)),
    select("filter-source", "Source", choices("data_source")),
    select("filter-step", "Step", ["all", ...steps.filter((step) => step !== "all")]),
    el("label", {}, "Text", el("input", { id: "filter-text", type: "search" })));
  const count = el("p", { id: "count", class: "faint", "aria-live": "polite" });
  const list = el("div", { id: "list" });
  const more = el("button", { type: "button" }, "Show more");
  let chosen = [];
  const show = () => {
    const start = list.childElementCount;
    list.append(...chosen.slice(start, start + PAGE).map(sampleView));
    more.hidden = list.childElementCount >= chosen.length;
  };
  const value = (id) => form.querySelector(`#filter-${id}`)?.value ?? "all";
  const filter = () => {
    const text = value("text").toLowerCase();
    const same = (id, actual) => value(id) === "all" || value(id) === String(actual);
    chosen = everything.filter((s) => SCORES[value("score")](s) && same("run", s.run)
      && same("source", s.data_source) && same("step", s.step)
      && (!text || [s.uid, s.question, s.response, s.ground_truth].join("\n").toLowerCase().includes(text)));
    chosen.sort((a, b) => b.step - a.step);
    list.replaceChildren();
    count.textContent = `${chosen.length} of ${everything.length} responses`;
    show();
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", show);
  add("samples", form, count, list, more);
  filter();
}

function sampleView(sample) {
  const kind = sample.score === null ? "faint" : sample.score > 0 ? "good" : "bad";
  const start = sample.question.slice(-120);
  const view = el("details", {},
    el("summary", {}, el("strong", { class: kind }, number(sample.score, 3)),
      ` · step ${sample.step} · ${many ? `${sample.run} · ` : ""}${sample.data_source} · ${start}`));
  view.addEventListener("toggle", () => {
    if (view.childElementCount > 1) return;
    const facts = [
      ["row", sample.uid], ["rule", number(sample.rule, 3)], ["judge", number(sample.judge, 3)],
      ["gold", sample.ground_truth], ["answer as read", sample.prediction || "none"],
      ["read from", sample.matched || "nothing"],
      ["tokens", `${number(sample.num_tokens)}${sample.finished === false ? ", cut at the limit" : ""}`],
    ];
    view.append(el("div", {},
      el("h3", {}, "Question"), el("pre", { tabindex: "0" }, sample.question),
      ...(sample.prompt_end ? [el("h3", {}, "Prompt end"),
        el("pre", { tabindex: "0" }, sample.prompt_end)] : []),  // logs of before have none
      el("h3", {}, "Response"), response(sample),
      el("dl", { class: "facts" },
        ...facts.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]))));
  });
  return view;
}

/** The response with the answer that was read from it marked, at its last place. */
function response({ response: text, prediction }) {
  const at = prediction ? text.lastIndexOf(prediction) : -1;
  if (at < 0) return el("pre", { tabindex: "0" }, text);
  const end = at + prediction.length;
  return el("pre", { tabindex: "0" }, text.slice(0, at), el("mark", {}, prediction), text.slice(end));
}

// --- settings and environment ----------------------------------------------------------------

function settings() {
  const head = ["setting", "default", ...(many ? runs.map((run) => run.label) : ["this run"])];
  const differ = (row) => row.values.some((value) => value !== row.values[0]);
  const box = el("input", { type: "checkbox", id: "only" });
  const place = el("div", {});
  const show = () => {
    const rows = data.settings.filter((row) => !box.checked || differ(row));
    place.replaceChildren(table(head, rows.map((row) => [
      differ(row) && many ? el("strong", {}, row.name) : row.name, row.default, ...row.values,
    ]), "words"));
  };
  box.checked = many;
  box.addEventListener("change", show);
  add("settings", el("p", { class: "faint" }, "Settings that differ from their default."),
    many ? el("label", { class: "inline" }, box, "only those that differ between the runs") : null, place);
  show();
}

function environment() {
  const names = [...new Set(runs.flatMap((run) => run.starts.flatMap((start) => Object.keys(start))))];
  const rows = runs.flatMap((run) => run.starts.map((start) => [
    ...(many ? [runName(run.label)] : []), ...names.map((name) => start[name] ?? "–")]));
  add("environment", el("p", { class: "faint" }, "One line for each start of a run."),
    table([...(many ? ["run"] : []), ...names], rows, "words"));
}

document.title = `qlrl report: ${runs.map((run) => run.label).join(", ")}`;
add("written", `Written ${data.written} by megatron_qlrl ${data.version}.`);
for (const part of [summary, evaluation, curves, curriculum, samples, settings, environment]) part();
