"use strict";
// Plots by Chart.js. Each is drawn anew when the page turns light or dark.

const plots = [];

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function runColour(number) {
  return colour(`c${(number % 6) + 1}`);
}

// Writes the value of each bar above it; Chart.js itself has no labels on bars.
const barLabels = {
  id: "barLabels",
  afterDatasetsDraw(chart, _args, options) {
    if (!options.format) return;
    const { ctx } = chart;
    ctx.save();
    ctx.fillStyle = colour("text");
    ctx.font = "12px sans-serif";
    ctx.textAlign = "center";
    chart.data.datasets.forEach((set, number) => {
      if (set.type === "line" || !chart.isDatasetVisible(number)) return;
      chart.getDatasetMeta(number).data.forEach((bar, at) => {
        const value = set.data[at];
        if (value !== null) ctx.fillText(options.format(value), bar.x, bar.y - 5);
      });
    });
    ctx.restore();
  },
};

// A card with a plot. `make` returns Chart.js's configuration, with the colours that the page has then.
function plotCard(title, description, make) {
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: ${description}`);
  const place = element("div", { class: "plot" }, [canvas]);
  const plot = { canvas, make, chart: null };
  plots.push(plot);
  return element("figure", { class: "card", style: "margin:0" }, [element("h3", {}, [title]), place]);
}

function drawPlots() {
  Chart.defaults.color = colour("faint");
  Chart.defaults.borderColor = colour("line");
  Chart.defaults.font.family = "system-ui, 'DejaVu Sans', sans-serif";
  Chart.defaults.animation = false;
  Chart.defaults.maintainAspectRatio = false;
  for (const plot of plots) {
    if (plot.chart) plot.chart.destroy();
    plot.chart = new Chart(plot.canvas, plot.make());
  }
}

function axis(title, more = {}) {
  return { title: { display: Boolean(title), text: title }, ...more };
}

function stepAxis() {
  // Chart.js puts a tick at the last step too, which may lie on the one before.
  const afterBuildTicks = ({ ticks }) => {
    const last = ticks.length - 1;
    if (last > 1 && ticks[last].value - ticks[last - 1].value < 0.5 * (ticks[1].value - ticks[0].value)) ticks.pop();
  };
  return axis("step", { type: "linear", bounds: "data", min: 0, ticks: { precision: 0 }, afterBuildTicks });
}

function legend(shown) {
  return { display: shown, position: "bottom", labels: { boxWidth: 14, boxHeight: 2, filter: (item) => item.text } };
}

function points([steps, values]) {
  return steps.map((step, at) => ({ x: step, y: values[at] }));
}

function meansOfFive(curve) {
  return curve.map(({ x }, at) => {
    const near = curve.slice(Math.max(0, at - 4), at + 1);
    return { x, y: near.reduce((sum, point) => sum + point.y, 0) / near.length };
  });
}

function line(label, data, shade, more = {}) {
  const radius = data.length > 60 ? 0 : 2;
  return {
    label,
    data,
    borderColor: shade,
    backgroundColor: shade,
    borderWidth: 2,
    pointRadius: radius,
    clip: 6,
    ...more,
  };
}

// `parts`: [name in the log, what the legend calls it, dash] of the curves that share a plot.
function curveCard(runs, title, unit, parts, { smooth = false, share = false } = {}) {
  const has = (run) => parts.some(([name]) => run.curves[name]);
  if (!runs.some(has)) return null;
  const description = runs
    .filter(has)
    .map((run) => described(run, parts, runs.length > 1))
    .join("; ");
  return plotCard(title, description, () => {
    const datasets = [];
    runs.forEach((run, number) => {
      parts.forEach(([name, label, dash], part) => {
        if (!run.curves[name]) return;
        const shade = runs.length > 1 ? runColour(number) : runColour(part);
        const called = [runs.length > 1 ? run.name : "", label].filter(Boolean).join(", ");
        const data = points(run.curves[name]);
        if (!smooth) datasets.push(line(called, data, shade, { borderDash: runs.length > 1 ? dash : [] }));
        else {
          if (runs.length === 1) datasets.push(line("each log", data, `${shade}66`, { borderWidth: 1 }));
          datasets.push(
            line(runs.length > 1 ? run.name : "mean of the last five", meansOfFive(data), shade, { pointRadius: 0 }),
          );
        }
      });
    });
    const bounds = share ? { min: 0, max: 1 } : { beginAtZero: true };
    return {
      type: "line",
      data: { datasets },
      options: {
        interaction: { mode: "nearest", axis: "x", intersect: false },
        plugins: { legend: legend(datasets.length > 1 || runs.length > 1) },
        scales: { x: stepAxis(), y: axis(unit, bounds) },
      },
    };
  });
}

function described(run, parts, named) {
  const said = parts
    .filter(([name]) => run.curves[name])
    .map(([name, label]) => {
      const values = run.curves[name][1];
      return `${label ? `${label} ` : ""}from ${values[0]} to ${values[values.length - 1]}`;
    });
  return `${named ? `${run.name} ` : ""}${said.join(", ")}`;
}

function stepSecondsCard(run, named) {
  const phases = Object.keys(run.step_seconds);
  if (!phases.length) return null;
  const title = `seconds of a step${named ? `, ${run.name}` : ""}`;
  return plotCard(
    title,
    described(
      { curves: run.step_seconds },
      phases.map((name) => [name, name]),
      false,
    ),
    () => ({
      type: "line",
      data: {
        datasets: phases.map((name, number) =>
          line(name, points(run.step_seconds[name]), runColour(number), {
            pointRadius: 0,
            borderWidth: 1,
            fill: number ? "-1" : "origin",
            backgroundColor: `${runColour(number)}99`,
          }),
        ),
      },
      options: {
        interaction: { mode: "index", intersect: false },
        plugins: { legend: legend(true) },
        scales: {
          x: stepAxis(),
          y: axis("seconds", { stacked: true, beginAtZero: true }),
        },
      },
    }),
  );
}

function secondsCard(runs) {
  const timed = runs.filter((run) => run.seconds.length);
  if (!timed.length) return null;
  const phases = ["rollout", "feedback", "score", "learn", "save", "eval"].filter((phase) =>
    timed.some((run) => run.seconds.some(([name]) => name === phase)),
  );
  const description = timed
    .map((run) => `${run.name}: ${run.seconds.map(([name, spent]) => `${name} ${spent.toFixed(1)}`).join(", ")}`)
    .join("; ");
  return plotCard("seconds in all, with saving and evaluation", description, () => ({
    type: "bar",
    data: {
      labels: timed.map((run) => run.name),
      datasets: phases.map((phase, number) => ({
        label: phase,
        backgroundColor: runColour(number),
        maxBarThickness: 46,
        data: timed.map((run) => (run.seconds.find(([name]) => name === phase) || [phase, 0])[1]),
      })),
    },
    options: {
      indexAxis: "y",
      plugins: { legend: { position: "bottom", labels: { boxWidth: 14 } } },
      scales: { x: axis("seconds", { stacked: true }), y: { stacked: true } },
    },
  }));
}

function barCard({ title, labels, sets }) {
  const shades = { before: "grey", after: "c1" };
  const description = sets
    .map(
      ([when, values]) =>
        `${when} ${values.map((value) => (value === null ? "not measured" : `${value} %`)).join(", ")}`,
    )
    .join("; ");
  return plotCard(`${title}`, description, () => ({
    type: "bar",
    data: {
      labels,
      datasets: sets.map(([when, data]) => ({
        label: when,
        data,
        backgroundColor: colour(shades[when] || "c2"),
        maxBarThickness: 60,
      })),
    },
    options: {
      plugins: {
        legend: { position: "bottom", labels: { boxWidth: 14 } },
        barLabels: { format: (value) => `${Math.round(value)} %` },
      },
      scales: {
        y: axis("%", { min: 0, max: 115, ticks: { stepSize: 25, callback: (tick) => (tick > 100 ? "" : tick) } }),
        x: { grid: { display: false } },
      },
    },
  }));
}

function forgettingCard(tables) {
  const measured = tables.filter((table) => table.forgetting.mean !== null);
  if (!measured.length) return null;
  const seeds = Math.max(...measured.map((table) => table.forgetting.seeds.length));
  const named = (table) => table.method + (table.after ? `, after ${table.after}` : "");
  const description = measured
    .map(
      (table) =>
        `${named(table)} ${table.forgetting.mean.toFixed(3)}, seeds ${table.forgetting.seeds.map((value) => value.toFixed(3)).join(" ")}`,
    )
    .join("; ");
  return plotCard("forgetting after the last stage (bar: mean, points: seeds)", description, () => ({
    type: "bar",
    data: {
      labels: measured.map(named),
      datasets: [
        ...Array.from({ length: seeds }, (_, seed) => ({
          type: "line",
          label: "",
          showLine: false,
          pointRadius: 4,
          borderColor: colour("card"),
          pointBackgroundColor: colour("text"),
          data: measured.map((table) => table.forgetting.seeds[seed] ?? null),
        })),
        {
          label: "mean",
          data: measured.map((table) => table.forgetting.mean),
          backgroundColor: colour("c1"),
          maxBarThickness: 60,
        },
      ],
    },
    options: {
      plugins: { legend: { display: false } },
      scales: { y: axis("nats a token", { beginAtZero: true }), x: { grid: { display: false } } },
    },
  }));
}
