"use strict";
// The page from its data. Texts become text nodes: nothing that a run has written is read as HTML.

function element(name, attributes, children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== "") made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function note(text) {
  return element("p", { class: "note" }, [text]);
}

function section(title, children) {
  const shown = children.filter((child) => child !== null);
  if (!shown.length) return null;
  return element("section", {}, [element("h2", {}, [title]), ...shown]);
}

function grid(cards, wide = false) {
  const shown = cards.filter((card) => card !== null);
  return shown.length ? element("div", { class: wide || shown.length === 4 ? "grid two" : "grid" }, shown) : null;
}

// `rows`: [name, a cell for each run]. The names of the runs are above, where there are several.
function table(kind, runs, rows) {
  if (!rows.length) return null;
  const head = element("thead", {}, [
    element("tr", {}, [element("td", {}, []), ...runs.map((run) => element("th", { scope: "col" }, [run.name]))]),
  ]);
  const body = element(
    "tbody",
    {},
    rows.map(([name, cells]) =>
      element("tr", {}, [element("th", { scope: "row" }, [name]), ...cells.map((cell) => element("td", {}, [cell]))]),
    ),
  );
  const whole = element("table", { class: kind }, runs.length > 1 ? [head, body] : [body]);
  return element("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": kind }, [whole]);
}

function heatMap(evaluated, { method, rows }) {
  const cell = ({ mean, seeds }) => {
    const made = element("td", { title: seeds.map((value) => `${(100 * value).toFixed(1)} %`).join(", ") }, [
      mean === null ? "" : `${(100 * mean).toFixed(0)} %`,
    ]);
    made.style.setProperty("--d", mean === null ? 0 : mean);
    return made;
  };
  const head = element("tr", {}, [
    element("td", { style: "background:none" }, []),
    ...evaluated.map((name) => element("th", { scope: "col" }, [name])),
  ]);
  const body = rows.map(([stage, cells]) =>
    element("tr", {}, [element("th", { scope: "row" }, [stage]), ...cells.map(cell)]),
  );
  return element("div", { class: "card scroll", tabindex: 0, role: "region", "aria-label": `accuracy, ${method}` }, [
    element("h3", {}, [`${method}: accuracy after each stage`]),
    element("table", { class: "heat" }, [element("thead", {}, [head]), element("tbody", {}, body)]),
  ]);
}

function showReport(data) {
  const { runs } = data;
  const several = runs.length > 1;
  const add = (...parts) => document.getElementById("report").append(...parts.filter((part) => part !== null));
  add(
    element("h1", {}, [several ? `${runs.length} runs compared` : runs[0].name]),
    ...runs.map((run) =>
      run.headline ? element("p", {}, [several ? `${run.name}: ${run.headline}` : run.headline]) : null,
    ),
    element("p", { class: "faint" }, [`written ${data.made} by sdft report ${data.version}`]),
    ...runs.flatMap((run) => run.notes.map((text) => note(several ? `${run.name}: ${text}` : text))),
  );
  const measured = [grid(data.bars.map(barCard)), table("numbers", runs, data.numbers)];
  add(
    section(
      "What it measured",
      runs.length > 2 || measured.includes(null) ? measured : [element("div", { class: "beside" }, measured)],
    ),
  );
  add(
    section("Training", [
      grid([
        curveCard(runs, several ? "loss, mean of five logs" : "loss", "nats a token", [["loss", ""]], { smooth: true }),
        curveCard(runs, "entropy", "nats a token", [
          ["student_entropy", "student", []],
          ["teacher_entropy", "teacher", [5, 4]],
        ]),
        curveCard(runs, "length of completions", "tokens", [["completion_length", ""]]),
        curveCard(runs, "finished completions", "share", [["finished", ""]], { share: true }),
        curveCard(runs, "teacher's first tokens out of reach", "share", [["out_of_reach", ""]], { share: true }),
        curveCard(runs, "accuracy on held-out prompts", "share", [["eval_accuracy", ""]], { share: true }),
        curveCard(runs, "forgetting", "nats a token from the base", [["eval_forgetting", ""]]),
      ]),
    ]),
  );
  add(
    section("Time", [
      grid([
        curveCard(runs, "tokens a second", "tokens a second", [
          ["tokens_per_second", "learned from", []],
          ["rollout_tokens_per_second", "written in rollouts", [5, 4]],
        ]),
        ...runs.map((run) => stepSecondsCard(run, several)),
        secondsCard(runs),
      ]),
    ]),
  );
  for (const found of data.continual) {
    const title = `One skill after the other${several ? `, ${found.run}` : ""}`;
    add(
      section(title, [
        grid([...found.tables.map((each) => heatMap(found.evaluated, each)), forgettingCard(found.tables)], true),
      ]),
    );
  }
  for (const run of runs) {
    if (run.samples.length) add(section(`Rollouts${several ? `, ${run.name}` : ""}`, samplesOf(run)));
  }
  const all = table("settings", runs, data.settings);
  add(
    section("What ran", [
      table("facts", runs, data.facts),
      data.differing.length ? element("h3", { style: "margin-top:20px" }, ["settings that differ"]) : null,
      table("settings", runs, data.differing),
      all &&
        element("details", { style: "margin-top:16px" }, [
          element("summary", {}, [`all ${data.settings.length} settings`]),
          all,
        ]),
    ]),
  );
  Chart.register(barLabels);
  drawPlots();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
}

showReport(JSON.parse(document.getElementById("data").textContent));
