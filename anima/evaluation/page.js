"use strict";
// The battles of the report: filter, draw twenty at a time. All texts are set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const filters = ["one", "other", "category", "result", "judge"].map((id) => document.getElementById(id));
const search = document.getElementById("search");
const list = document.getElementById("battles");
const more = document.getElementById("more");
let found = [];
let shown = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function fill(select, values) {
  for (const value of values) select.append(new Option(value, value));
}

function resultFor(battle, model) {
  if (battle.result === "tie" || battle.result === "disagree" || battle.result === "unread") return battle.result;
  return battle.result === model ? "won" : "lost";
}

function matches(battle) {
  const [one, other, category, result, judge] = filters.map((select) => select.value);
  const models = [battle.one, battle.other];
  if (one && !models.includes(one)) return false;
  if (other && !models.includes(other)) return false;
  if (one && other && one === other) return false;
  if (category && battle.category !== category) return false;
  if (judge && battle.judge !== judge) return false;
  if (result === "won" || result === "lost") {
    if (!one || resultFor(battle, one) !== result) return false;
  } else if (result && battle.result !== result) return false;
  const words = search.value.trim().toLowerCase();
  if (!words) return true;
  const texts = [data.questions[battle.question], ...models.map((name) => data.answers[name][battle.question])];
  return [...texts, ...battle.verdicts.map((verdict) => verdict.text)].some((t) => t.toLowerCase().includes(words));
}

function side(battle, name) {
  const box = element("div", "side" + (battle.result === name ? " winner" : ""));
  const answer = data.answers[name][battle.question];
  const title = element("h3");
  title.append(element("b", "", name), element("span", "", `${[...answer].length} characters`));
  box.append(title, element("div", "text", answer || "(empty)"));
  return box;
}

function verdict(entry) {
  const box = element("details");
  const head = element("summary");
  const scores = entry.scores ? ` ${entry.scores.join(" : ")}` : "";
  const said = { first: `${entry.first} better`, second: `${entry.second} better`, tie: "tie" }[entry.outcome];
  head.append(`${entry.first} shown first: `, element("b", "", (said || "unparsable, not scored") + scores));
  box.append(head, element("div", "text", entry.text || "(empty)"));
  return box;
}

function card(battle) {
  const words = {
    tie: "tie", disagree: "orders disagree: counted as a tie", unread: "not scored: a verdict is missing or unparsable",
  };
  const box = element("article");
  const head = element("header");
  const meta = element("div", "meta");
  const kind = words[battle.result] ? battle.result : "won";
  meta.append(element("span", "", `question ${battle.question}`), element("span", "", battle.category));
  meta.append(element("span", "", `judge ${battle.judge}`));
  meta.append(element("span", `badge ${kind}`, words[battle.result] || `${battle.result} won`));
  head.append(meta, element("div", "question", data.questions[battle.question]));
  const sides = element("div", "sides");
  sides.append(side(battle, battle.one), side(battle, battle.other));
  box.append(head, sides, ...battle.verdicts.map(verdict));
  return box;
}

function drawMore() {
  for (const battle of found.slice(shown, shown + PAGE)) list.append(card(battle));
  shown = Math.min(found.length, shown + PAGE);
  more.hidden = shown >= found.length;
  document.getElementById("count").textContent =
    `${found.length} of ${data.battles.length} battles` + (shown < found.length ? `, ${shown} shown` : "");
}

function draw() {
  // "won" and "lost" are told from the side of the first model.
  for (const option of filters[3].options) {
    if (option.value === "won" || option.value === "lost") option.disabled = !filters[0].value;
  }
  if (!filters[0].value && ["won", "lost"].includes(filters[3].value)) filters[3].value = "";
  found = data.battles.filter(matches);
  shown = 0;
  list.replaceChildren();
  drawMore();
}

fill(filters[0], data.models);
fill(filters[1], data.models);
fill(filters[2], [...new Set(data.battles.map((battle) => battle.category))].sort());
fill(filters[4], [...new Set(data.battles.map((battle) => battle.judge))].sort());
for (const control of [...filters, search]) control.addEventListener("input", draw);
more.addEventListener("click", drawMore);
draw();
