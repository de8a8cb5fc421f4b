"use strict";
// Draws the charts of a report when they come into sight, and lets its pictures be leafed through.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const COLORS = 8;
  const control = (id) => document.getElementById(id);
  let ready = null; // Plotly, once it is unpacked

  async function unpack() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(plain).text();
    document.head.append(script);
  }

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Means with weights that fall by `weight` a point, without the pull of the zero at the start.
  function smooth(values, weight) {
    let mean = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + 1 - weight;
      return mean / total;
    });
  }

  function lineTraces(line, weight) {
    const color = css(`--c${line.color % COLORS}`);
    const dash = DASHES[Math.floor(line.color / COLORS) % DASHES.length];
    const few = line.x.length < 40;
    const base = {
      type: "scatter", name: line.name, x: line.x, y: line.y, mode: few ? "lines+markers" : "lines",
      line: { color, dash, width: 1.8 }, marker: { color, size: 5 },
      hovertemplate: "%{y:.5g}", connectgaps: false,
    };
    if (line.std) {
      base.error_y = { type: "data", array: line.std, color, thickness: 1, width: 3 };
    }
    if (!weight) return [base];
    const faint = {
      ...base, mode: "lines", opacity: 0.28, hoverinfo: "skip", hovertemplate: undefined,
      line: { color, width: 1 }, error_y: undefined,
    };
    const x = line.mean_x || line.x, y = smooth(line.mean_y || line.y, weight);
    const thick = {
      ...base, x, y, mode: "lines", error_y: undefined, line: { color, dash, width: 2.2 },
    };
    return [faint, thick];
  }

  function shareTraces(line) {
    const color = css(`--c${line.color % COLORS}`);
    return [{
      type: "scatter", mode: "lines", name: line.name, x: line.x, y: line.y, stackgroup: "one",
      line: { width: 0.5, color }, hovertemplate: "%{y:.1%}",
    }];
  }

  function layout(chart) {
    const muted = css("--muted"), grid = css("--grid"), card = css("--card"), text = css("--text");
    const log = control("log").checked && !chart.shares;
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true };
    const marks = control("checkpoints").checked ? chart.checkpoints : [];
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font") || "system-ui, sans-serif", size: 12, color: muted },
      margin: { l: 8, r: 12, t: 8, b: 8 }, autosize: true, hovermode: "x unified",
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: text, size: 12 } },
      showlegend: false,
      dragmode: touch ? false : "zoom", uirevision: "keep",
      xaxis: {
        ...axis, title: { text: "step", font: { size: 11 }, standoff: 4 }, tickformat: "~s",
        hoverformat: ",d", nticks: 7,
      },
      yaxis: {
        ...axis, type: log ? "log" : "linear", nticks: 7, tickformat: chart.shares ? ".0%" : "~g",
        range: chart.shares ? [0, 1] : undefined, exponentformat: "e",
      },
      shapes: marks.map((x) => ({
        type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below",
        line: { color: muted, width: 1, dash: "dot" },
      })),
    };
  }

  // What the legend of a chart, or that of all charts around it, has switched off.
  const hidden = new Map(); // {card or group: names}
  function isHidden(plot, name) {
    return [".card", ".group"].some((place) => hidden.get(plot.closest(place))?.has(name));
  }

  function toggleLine(button) {
    const place = button.closest(".card") || button.closest(".group");
    const names = hidden.get(place) || new Set();
    const name = button.dataset.line;
    if (!names.delete(name)) names.add(name);
    hidden.set(place, names);
    button.setAttribute("aria-pressed", String(!names.has(name)));
    redraw();
  }

  function draw(plot) {
    const chart = data.charts[plot.dataset.chart];
    const weight = chart.section === "evaluation" ? 0 : Number(control("smoothing").value);
    const visible = chart.lines.filter((line) => !isHidden(plot, line.name));
    const traces = visible.flatMap((line) => chart.shares ?
      shareTraces(line) : lineTraces(line, weight));
    const settings = {
      responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "pan2d", "zoomIn2d", "zoomOut2d"],
    };
    plot.dataset.drawn = "";
    Plotly.react(plot, traces, layout(chart), settings);
  }

  const redraw = () => plots.filter((p) => "drawn" in p.dataset).forEach(draw);

  function tellWhatIsMissing(plot) {
    const lost = data.charts[plot.dataset.chart].lines.filter((line) => line.not_finite);
    const words = lost.map(({ name, not_finite: { count, steps } }) =>
      `${name}: ${count} value${count > 1 ? "s" : ""} not finite, ` +
      `step ${steps.join(", ")}${count > steps.length ? ", …" : ""}`);
    const note = plot.parentElement.querySelector(".lost");
    note.textContent = words.join("; ");
    note.hidden = !words.length;
  }

  function watch() {
    plots.forEach(tellWhatIsMissing);
    const seen = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        ready = ready || unpack();
        ready.then(() => draw(target), (error) => { target.textContent = `No curves: ${error}`; });
      }
    }, { rootMargin: "300px" });
    plots.forEach((plot) => seen.observe(plot));
    document.querySelector(".controls").hidden = false;
    const marked = data.charts.some((chart) => chart.checkpoints.length);
    control("checkpoints").parentElement.hidden = !marked;
    control("smoothing").addEventListener("input", (event) => {
      control("smoothing-value").textContent = event.target.value;
      redraw();
    });
    for (const id of ["log", "checkpoints"]) control(id).addEventListener("change", redraw);
    dark.addEventListener("change", redraw);
    for (const button of document.querySelectorAll(".legend button")) {
      button.addEventListener("click", () => toggleLine(button));
    }
  }

  // Of every row of frames the one nearest to the step that the slider is at.
  function leaf(gallery) {
    const rows = [...gallery.querySelectorAll(".frames")];
    const frames = rows.map((row) => [...row.querySelectorAll("figure")]);
    const steps = [...new Set(frames.flat().map((f) => Number(f.dataset.step)))];
    steps.sort((a, b) => a - b);
    if (steps.length < 2) return;
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1 });
    slider.setAttribute("aria-label", "Step");
    const shown = document.createElement("output");
    const all = document.createElement("button");
    all.type = "button";
    const bar = document.createElement("div");
    bar.className = "slide";
    bar.append(slider, shown, all);
    gallery.append(bar);

    function show() {
      const step = steps[slider.value];
      const distance = (figure) => Math.abs(Number(figure.dataset.step) - step);
      for (const row of frames) {
        const nearest = row.reduce((a, b) => (distance(b) < distance(a) ? b : a));
        row.forEach((figure) => figure.classList.toggle("now", figure === nearest));
      }
      shown.textContent = `step ${step.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", shown.textContent);
    }

    function toggle() {
      const one = gallery.classList.toggle("one");
      gallery.classList.toggle("strip", !one);
      all.textContent = one ? "Show all" : "One at a time";
      slider.disabled = !one;
    }

    slider.addEventListener("input", show);
    all.addEventListener("click", toggle);
    toggle();
    const { width, height } = frames[0][0].querySelector("img");
    if (rows.length === 1 && width < height / 2) toggle(); // There is room for many.
    show();
  }

  if (plots.length) watch();
  document.querySelectorAll("[data-gallery]").forEach(leaf);
})();
