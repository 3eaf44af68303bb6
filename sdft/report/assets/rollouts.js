"use strict";
// Rollouts, token by token: each is shaded by its divergence, and shows what both models held likely there.

function visible(text) {
  return text === "" ? "▫" : text.replace(/\n/g, "↵\n").replace(/\t/g, "→\t");
}

function quoted(text) {
  return `“${text.replace(/\n/g, "↵").replace(/\t/g, "→")}”`;
}

function probability(logprob) {
  if (logprob === null || logprob === undefined) return "–";
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}

function samplesOf(run) {
  const divergences = run.samples
    .flatMap((sample) =>
      sample.rollouts.flatMap((rollout) =>
        (rollout.tokens || []).map((token) => token[1]).filter((value) => value !== null),
      ),
    )
    .sort((a, b) => a - b);
  const scale = Math.max(0.05, divergences[Math.floor(0.95 * divergences.length)] || 0);
  const legend = element("p", { class: "faint" }, [
    "divergence of a token: 0",
    element("span", { class: "scale" }, []),
    `${scale.toFixed(2)} nats and more. Point at a token, or go to it with Tab and the arrow keys, for what student and teacher held likely there.`,
  ]);
  const old = run.samples.some((sample) => sample.rollouts.some((rollout) => !rollout.tokens));
  return [
    divergences.length ? legend : null,
    old
      ? note("completions.jsonl is of a version that did not write the texts of tokens: rollouts are shown whole.")
      : null,
    ...run.samples.map((sample) => sampleCard(sample, scale)),
  ];
}

function sampleCard(sample, scale) {
  const shown = element("details", {}, [
    element("summary", {}, ["what the teacher saw"]),
    element("pre", { tabindex: 0 }, [sample.teacher_prompt]),
  ]);
  return element("article", { class: "card sample" }, [
    element("h3", {}, ["prompt"]),
    element("pre", { tabindex: 0, "aria-label": "prompt" }, [sample.prompt]),
    sample.teacher_prompt ? shown : null,
    element(
      "div",
      { class: "sides" },
      sample.rollouts.map((rollout) => rolloutSide(rollout, scale)),
    ),
  ]);
}

function rolloutSide(rollout, scale) {
  const tokens = rollout.tokens;
  const parts = [element("h4", {}, [`step ${rollout.step}`])];
  if (!tokens) return element("div", {}, [...parts, element("pre", { tabindex: 0 }, [rollout.completion])]);
  const divergences = tokens.map((token) => token[1]).filter((value) => value !== null);
  const mean = divergences.reduce((sum, value) => sum + value, 0) / divergences.length;
  if (divergences.length)
    parts.push(
      element("p", { class: "faint" }, [`${tokens.length + rollout.left_out} tokens, ${mean.toFixed(3)} nats a token`]),
    );
  const list = element(
    "div",
    {
      class: "tokens",
      role: "listbox",
      "aria-orientation": "horizontal",
      "aria-label": `tokens of the rollout of step ${rollout.step}`,
    },
    tokens.map((token, number) => tokenOf(token, number, scale)),
  );
  list.addEventListener("keydown", moveAmongTokens);
  parts.push(list);
  if (rollout.left_out)
    parts.push(element("p", { class: "faint" }, [`${rollout.left_out} more tokens are in completions.jsonl.`]));
  return element("div", {}, parts);
}

function tokenOf(token, number, scale) {
  const [text, divergence, student, teacher] = token;
  const label =
    divergence === null
      ? "not part of the loss"
      : `divergence ${divergence.toFixed(3)} nats, student ${probability(student)}, teacher ${probability(teacher)}`;
  const shade = divergence === null ? 0 : Math.min(1, Math.max(0, divergence / scale));
  const span = element(
    "span",
    {
      role: "option",
      tabindex: number ? -1 : 0,
      "aria-label": `${quoted(text)}: ${label}`,
      "aria-describedby": "token",
      class: divergence === null ? "skipped" : "",
    },
    [visible(text)],
  );
  span.style.setProperty("--d", shade.toFixed(3));
  for (const event of ["mouseenter", "focus"]) span.addEventListener(event, () => showToken(span, token));
  for (const event of ["mouseleave", "blur"]) span.addEventListener(event, hideToken);
  return span;
}

function moveAmongTokens(event) {
  const from = event.target;
  if (event.key === "Escape") return hideToken();
  const to = {
    ArrowRight: from.nextElementSibling,
    ArrowLeft: from.previousElementSibling,
    Home: from.parentElement.firstElementChild,
    End: from.parentElement.lastElementChild,
    ArrowDown: onLine(from, 1),
    ArrowUp: onLine(from, -1),
  }[event.key];
  if (!to) return;
  event.preventDefault();
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

// The token nearest to this one on the next line, or on the one before.
function onLine(from, way) {
  const here = from.getBoundingClientRect();
  let best = null;
  for (let to = from; to; to = way > 0 ? to.nextElementSibling : to.previousElementSibling) {
    const there = to.getBoundingClientRect();
    if ((there.top - here.top) * way < 4) continue;
    if (best && Math.abs(there.top - best.top) > 4) break;
    const distance = Math.abs(there.left - here.left);
    if (!best || distance < best.distance) best = { to, distance, top: there.top };
  }
  return best && best.to;
}

function showToken(span, [text, divergence, student, teacher, studentTop, teacherTop]) {
  const box = document.getElementById("token");
  const row = (name, cells) =>
    element("tr", {}, [element("th", { scope: "row" }, [name]), ...cells.map((cell) => element("td", {}, [cell]))]);
  const logprob = (value) => (value === null ? "–" : `${probability(value)}  (${value.toFixed(2).replace("-", "−")})`);
  const parts = [
    element("p", {}, [
      element("code", {}, [quoted(text)]),
      divergence === null ? " is not part of the loss" : `  divergence ${divergence.toFixed(3)} nats`,
    ]),
  ];
  if (divergence !== null) {
    const rows = [row("this token", [logprob(student), logprob(teacher)])];
    const count = Math.max((studentTop || []).length, (teacherTop || []).length);
    for (let at = 0; at < count; at += 1) {
      const cell = (pair) => (pair ? `${quoted(pair[0])} ${probability(pair[1])}` : "");
      rows.push(row(at ? "" : "likeliest", [cell((studentTop || [])[at]), cell((teacherTop || [])[at])]));
    }
    const head = element(
      "tr",
      {},
      ["", "student", "teacher"].map((name) => element("th", { scope: "col" }, [name])),
    );
    parts.push(element("table", {}, [element("thead", {}, [head]), element("tbody", {}, rows)]));
  }
  box.replaceChildren(...parts);
  box.hidden = false;
  const at = span.getClientRects()[0];
  const left = Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8);
  const below = at.bottom + 6 + box.offsetHeight < window.innerHeight || at.top < box.offsetHeight + 12;
  box.style.left = `${Math.max(8, left) + window.scrollX}px`;
  box.style.top = `${(below ? at.bottom + 6 : at.top - box.offsetHeight - 6) + window.scrollY}px`;
}

function hideToken() {
  document.getElementById("token").hidden = true;
}
