// The overview, live: figures and charts, refreshed every second.

import { connected } from "./dashboard.js";

const SECONDS = 600;
const root = document.body.dataset.root;
const RATE_SECONDS = 60;
const STATUS_MS = 5000;
const status = document.getElementById("live");
const samples = { second: [], minute: [] };
let step = "second";

const styles = () => getComputedStyle(document.documentElement);
const colours = { accent: "--accent", bad: "--bad-fill", second: "--second" };
const number = new Intl.NumberFormat(document.documentElement.lang);
const oneDigit = new Intl.NumberFormat(document.documentElement.lang, { minimumFractionDigits: 1, maximumFractionDigits: 1 });

function milliseconds(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function showNumbers() {
  const last = samples.second.at(-1);
  if (!last) return;
  for (const element of document.querySelectorAll("[data-now]")) element.textContent = number.format(last[element.dataset.now]);
  const minute = samples.second.slice(-RATE_SECONDS);
  const length = minute.reduce((total, sample) => total + sample.seconds, 0);
  for (const element of document.querySelectorAll("[data-rate]")) {
    const rate = length ? minute.reduce((total, sample) => total + sample[element.dataset.rate], 0) / length : 0;
    element.textContent = rate < 10 ? oneDigit.format(rate) : number.format(Math.round(rate));
  }
  for (const element of document.querySelectorAll("[data-sum]")) {
    const sum = samples.second.reduce((total, sample) => total + sample[element.dataset.sum], 0);
    element.textContent = element.dataset.text.replace("%", number.format(sum));
  }
}

// The latencies of ten minutes cannot be made from those of the seconds: the server merges its histograms.
async function showLatencies() {
  const answer = await fetch(`${root}/api/v1/status`);
  if (!answer.ok) return;
  const window = (await answer.json()).last_ten_minutes;
  for (const element of document.querySelectorAll("[data-ms]")) {
    const value = window?.[element.dataset.ms] ?? null;
    element.textContent = value === null ? "–" : milliseconds(value);
  }
}

// Charts

const charts = [];

function dataOf(chart) {
  const points = withGaps(samples[step]);
  const value = (sample, field) => {
    const amount = sample[field] ?? null;
    return chart.kind === "rate" && amount !== null ? (sample.seconds ? amount / sample.seconds : 0) : amount;
  };
  return [points.map((sample) => Date.parse(sample.at) / 1000), ...chart.fields.map(({ field }) => points.map((sample) => value(sample, field)))];
}

// A pause, for example while no server ran, is drawn as a gap: a point without values stands in it.
function withGaps(points) {
  const usual = step === "second" ? 1000 : 60000;
  return points.flatMap((sample, index) => {
    const before = index ? Date.parse(points[index - 1].at) : null;
    return before !== null && Date.parse(sample.at) - before > 3 * usual ? [{ at: new Date(before + usual).toISOString(), seconds: null }, sample] : [sample];
  });
}

const short = (value) => (value >= 1e6 ? `${value / 1e6}M` : value >= 1e4 ? `${value / 1e3}k` : number.format(value));

function draw(chart) {
  chart.plot?.destroy();
  const style = styles();
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = `11px ${style.getPropertyValue("--sans")}`;
  const axis = { stroke: colour("--quiet"), font, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  chart.plot = new window.uPlot(
    {
      width: chart.box.clientWidth,
      height: 150,
      legend: { show: false },
      cursor: { y: false, points: { size: 5 } },
      hooks: { setCursor: [(plot) => showValues(chart, plot)] },
      padding: [8, 18, 0, 0],
      scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, size: 28, grid: { show: false }, values: (_, times) => times.map(timeOfDay) },
        { ...axis, size: 46, values: (_, values) => values.map(short) },
      ],
      series: [
        {},
        ...chart.fields.map(({ colour: name }, index) => ({
          stroke: colour(colours[name]),
          fill: index === 0 ? `${colour(colours[name])}1f` : undefined,
          width: 1.5,
          spanGaps: false,
          points: { show: false },
        })),
      ],
    },
    dataOf(chart),
    chart.box,
  );
}

// The values under the pointer: beside the names of the lines, with the time.
function showValues(chart, plot) {
  const index = plot.cursor.idx;
  const under = index !== null && index !== undefined && plot.data[0][index] !== undefined;
  const format = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  chart.time.textContent = under ? new Intl.DateTimeFormat(document.documentElement.lang, format).format(new Date(plot.data[0][index] * 1000)) : "";
  chart.fields.forEach(({ value }, line) => {
    const amount = under ? plot.data[line + 1][index] : null;
    value.textContent = !under ? "" : amount === null || amount === undefined ? " –" : ` ${amount < 10 ? oneDigit.format(amount) : number.format(Math.round(amount))}`;
  });
}

function timeOfDay(seconds) {
  const format = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (step === "second" && seconds % 60) format.second = "2-digit";
  return new Intl.DateTimeFormat(document.documentElement.lang, format).format(new Date(seconds * 1000));
}

function showCharts() {
  document.getElementById("no-samples").hidden = samples[step].length > 0;
  for (const chart of charts) chart.plot?.setData(dataOf(chart));
}

function drawAll() {
  charts.forEach(draw);
}

async function load(which) {
  const answer = await fetch(`${root}/api/v1/series?step=${which}`);
  if (answer.ok) samples[which] = (await answer.json()).items;
}

// Events

function listen() {
  const source = new EventSource(`${root}/api/v1/stream`);
  const state = (on) => {
    status.hidden = false;
    status.classList.toggle("on", on);
    status.querySelector(".word").textContent = on ? status.dataset.live : status.dataset.stale;
    connected(on);
  };
  source.addEventListener("open", () => state(true));
  source.addEventListener("error", () => {
    state(false);
    // When it was refused, the browser does not try again by itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  });
  source.addEventListener("sample", (event) => {
    samples.second.push(JSON.parse(event.data));
    samples.second.splice(0, samples.second.length - SECONDS);
    showNumbers();
    if (step === "second") showCharts();
  });
}

for (const figure of document.querySelectorAll(".chart")) {
  const fields = [...figure.querySelectorAll("[data-field]")].map((line) => ({
    field: line.dataset.field,
    colour: line.dataset.colour,
    value: line.appendChild(Object.assign(document.createElement("strong"), { className: "under" })),
  }));
  const time = figure.querySelector(".legend").appendChild(document.createElement("time"));
  charts.push({ kind: figure.dataset.kind, box: figure.querySelector(".plot"), fields, time, plot: null });
}

for (const button of document.querySelectorAll("[data-step]")) {
  button.addEventListener("click", async () => {
    step = button.dataset.step;
    for (const other of document.querySelectorAll("[data-step]")) other.setAttribute("aria-pressed", String(other === button));
    await load(step);
    drawAll();
    showCharts();
  });
}

const boxes = new ResizeObserver(() => {
  for (const { plot, box } of charts) plot?.setSize({ width: box.clientWidth, height: 150 });
});

await load("second");
drawAll();
showCharts();
for (const { box } of charts) boxes.observe(box);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
setInterval(() => step === "minute" && load("minute").then(showCharts), 60000);
setInterval(() => document.visibilityState === "visible" && showLatencies().catch(() => connected(false)), STATUS_MS);
listen();
