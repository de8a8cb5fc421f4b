"use strict";
// Draws the curves from the state of the page's controls, and shows pictures by step.
const plots = [...document.querySelectorAll(".plot")];
const smoothing = document.getElementById("smoothing");
const log = document.getElementById("log");
const touch = matchMedia("(pointer: coarse)").matches;

// Plotly's script is compressed in the page.
async function unpack() {
  const packed = atob(document.getElementById("plotly").textContent.trim());
  const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

// Exponential moving average, divided by the sum of its weights: so it does not start at zero.
function smooth(values, decay) {
  let mean = 0, total = 0;
  return values.map((value) => {
    mean = decay * mean + (1 - decay) * value;
    total = decay * total + 1 - decay;
    return mean / total;
  });
}

function traces(trace, decay) {
  if (!decay || !trace.meta) return [trace];
  const faint = { ...trace, mode: "lines", opacity: 0.3, hoverinfo: "skip", hovertemplate: "" };
  const y = smooth(trace.meta.y, decay);
  return [faint, { ...trace, x: trace.meta.x, y, mode: "lines", error_y: {} }];
}

// A legend belongs to the curves of its card, or of the whole group of runs.
function hiddenLines(plot) {
  const boxes = [...document.querySelectorAll(".legend input:not(:checked)")];
  const near = boxes.filter((box) => box.closest(".card, .group").contains(plot));
  return new Set(near.map((box) => box.dataset.line));
}

function draw(plot) {
  const { data, layout } = JSON.parse(plot.previousElementSibling.textContent);
  const hidden = hiddenLines(plot), decay = Number(smoothing.value);
  const shown = data.filter((trace) => !hidden.has(trace.name));
  const stacked = data.some((trace) => trace.stackgroup);
  const yaxis = { ...layout.yaxis, type: log.checked && !stacked ? "log" : "linear" };
  const settings = {
    responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "pan2d", "zoomIn2d", "zoomOut2d"],
  };
  Plotly.react(plot, shown.flatMap((trace) => traces(trace, decay)),
    { ...layout, yaxis, uirevision: "zoom", dragmode: touch ? false : "zoom" }, settings);
}

// Draws all plots, those in sight first; gives up when a later call starts anew.
let newest = 0;
async function drawAll() {
  const call = ++newest;
  const distance = (plot) => Math.abs(plot.getBoundingClientRect().top);
  for (const plot of [...plots].sort((a, b) => distance(a) - distance(b))) {
    if (call !== newest) return;
    draw(plot);
    await new Promise((next) => setTimeout(next)); // The page can be used in between.
  }
}

async function start() {
  await unpack();
  drawAll();
  document.addEventListener("input", (event) => {
    if (event.target.matches("#smoothing, #log, .legend input")) drawAll();
  });
  const resize = (list) => list.forEach((plot) => Plotly.Plots.resize(plot));
  for (const details of document.querySelectorAll("details")) {
    details.addEventListener("toggle", () => resize([...details.querySelectorAll(".plot")]));
  }
  // Paper is narrower than the window.
  addEventListener("beforeprint", () => plots.forEach((p) => Plotly.relayout(p, { width: 620 })));
  addEventListener("afterprint", () => plots.forEach((p) => Plotly.relayout(p, { width: null })));
}

// Of each run's pictures shows the one whose step is nearest to the slider's.
function show(slider) {
  const step = JSON.parse(slider.dataset.steps)[slider.value];
  const distance = (figure) => Math.abs(figure.dataset.step - step);
  for (const row of slider.closest(".gallery").querySelectorAll(".frames")) {
    const figures = [...row.querySelectorAll("figure")];
    const nearest = figures.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    figures.forEach((figure) => { figure.hidden = figure !== nearest; });
  }
  slider.setAttribute("aria-valuetext", `step ${step}`);
}

for (const slider of document.querySelectorAll(".slide input")) {
  slider.addEventListener("input", () => show(slider));
  show(slider);
}
if (plots.length) start();
