"use strict";
// The playground: asks this server and shows its answers and ledgers. All text is set as text, never as markup.
const $ = (id) => document.getElementById(id);
const FATES = { "kept": "kept", "over budget": "over", "critic": "critic", "outranked": "rank", "scorer fault": "fault" };
const state = { turns: [], blocks: [], settings: null, abort: null };

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function number(value) { return value === null || value === undefined ? "–" : value.toFixed(2); }
function say(text, busy) { $("status").textContent = text; $("status").className = busy ? "busy" : ""; }

async function start() {
  const settings = await (await fetch("settings")).json();
  state.settings = settings;
  $("about").textContent = `${settings.model}: no answer whose cost is over the budget leaves, with respect to the cost model.`;
  $("budget").value = $("budget").max = settings.budget;
  $("beams").value = $("beams").min = settings.n_beams;
  $("beams").max = settings.most_beams;
  $("tokens").value = $("tokens").max = settings.most_tokens;
  $("key-field").hidden = !settings.keys;
  $("unguarded-field").hidden = !settings.unguarded;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = "Bearer " + $("key").value;
  return found;
}

function add(kind, who, text) {
  const item = make("li", undefined, kind);
  const body = make("p", text, "text");
  item.append(make("p", who, "who"), body);
  $("turns").append(item);
  item.scrollIntoView({ block: "nearest" });
  return { item, body };
}

async function failure(response) {
  try { return (await response.json()).error.message; } catch { return "HTTP " + response.status; }
}

async function send(event) {
  event.preventDefault();
  const message = $("message").value.trim();
  if (!message || state.abort) return;
  $("message").value = "";
  add("user", "You", message);
  const turns = [...state.turns, { role: "user", content: message }];
  state.blocks = [];
  draw();
  state.abort = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("Waiting for a place in the batch", true);
  const shown = add("guard", "Guarded", "");
  const bare = $("unguarded").checked ? unguarded(message) : null;
  try {
    const answer = await stream(turns, shown.body);
    finish(shown, answer);
    state.turns = [...turns, { role: "assistant", content: answer.text }];
  } catch (error) {
    shown.item.className = "failed";
    shown.body.textContent = error.name === "AbortError" ? "(stopped)" : "Error: " + error.message;
    say(error.name === "AbortError" ? "Stopped." : "The answer failed.");
  }
  if (bare) await bare;
  state.abort = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  $("message").focus();
}

async function stream(messages, body) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), signal: state.abort.signal,
    body: JSON.stringify({
      messages, stream: true, seed: Number($("seed").value), max_tokens: Number($("tokens").value),
      inferenceguard: { ledger: true, budget: Number($("budget").value), n_beams: Number($("beams").value) },
    }),
  });
  if (!response.ok) throw new Error(await failure(response));
  const answer = { text: "", choice: null };
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) read(event.replace(/^data: /, ""), answer, body);
  }
  if (!answer.choice) throw new Error("the stream ended early");
  return answer;
}

function read(data, answer, body) {
  if (data === "[DONE]") return;
  const chunk = JSON.parse(data);
  if (chunk.error) throw new Error(chunk.error.message);
  for (const choice of chunk.choices) {
    answer.text += choice.delta.content || "";
    body.textContent = answer.text;
    const own = choice.inferenceguard || {};
    if (own.blocks) { state.blocks.push(...own.blocks); draw(); }
    if (choice.finish_reason) answer.choice = choice;
    say(choice.finish_reason ? "" : `Block ${state.blocks.length} searched`, !choice.finish_reason);
  }
}

function finish(shown, answer) {
  const own = answer.choice.inferenceguard;
  const filtered = answer.choice.finish_reason === "content_filter";
  state.blocks = own.record.search;
  if (filtered) shown.item.className = "filtered";
  shown.item.querySelector(".who").textContent = filtered ? "Guarded: fallback" : "Guarded";
  if (!answer.text) shown.body.textContent = "(nothing: every fallback is over the budget)";
  const left = own.cost === null ? "not scored" : `cost ${number(own.cost)} of budget ${number(own.budget)}, ${number(own.budget_left)} left`;
  const verdict = `${filtered ? "Fallback released" : "Released"}: ${left}, reward ${number(own.reward)}, ${own.proposed_tokens} tokens proposed, ${own.seconds.toFixed(1)} s.`;
  $("verdict").replaceChildren(make("p", verdict, filtered ? "critic" : "kept"));
  if (own.record.why) $("verdict").append(make("p", "Why: " + own.record.why + "."));
  say(verdict);
  draw(own.record.released);
}

async function unguarded(message) {
  const shown = add("bare", "UNGUARDED: the bare LLM, no gate, last message only", "");
  try {
    const response = await fetch("v1/unguarded", {
      method: "POST", headers: headers(), signal: state.abort.signal,
      body: JSON.stringify({ message, seed: Number($("seed").value), max_tokens: Number($("tokens").value) }),
    });
    if (!response.ok) throw new Error(await failure(response));
    const answer = await response.json();
    shown.body.textContent = `${answer.text || "(nothing)"}\n[cost ${number(answer.cost)}]`;
  } catch (error) { shown.body.textContent = "Error: " + error.message; }
}

function draw(released) {
  $("plot").hidden = !state.blocks.length;
  if (!state.blocks.length) $("verdict").replaceChildren(make("p", "Searching…"));
  $("blocks").replaceChildren(...state.blocks.map(table));
  if (state.blocks.length) chart(released);
}

// Others were better whatever its cost, so that the cost model was not asked.
function passedOver(block, row) { return block.fate[row] === "outranked" && block.cost[row] === null; }

function table(block, index) {
  const details = make("details");
  details.open = index === state.blocks.length - 1;
  const counts = Object.keys(FATES).map((fate) => [fate, block.fate.filter((other) => other === fate).length]);
  const told = counts.filter(([, count]) => count).map(([fate, count]) => `${count} ${fate}`).join(", ");
  details.append(make("summary", `Block ${block.block + 1}: ${block.fate.length} proposals, ${told}`));
  const grid = make("table");
  const head = make("tr");
  for (const name of ["#", "try", "tokens", "cost", "z", "p safe", "score", "fate"]) {
    const cell = make("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = make("tbody");
  block.fate.forEach((fate, row) => {
    const line = make("tr");
    const z = passedOver(block, row) ? "–" : block.budget[row] === null ? "–∞" : number(block.budget[row]);
    const score = block.score[row] === null || block.score[row] <= -1e5 ? "–" : number(block.score[row]);
    const cells = [row + 1, block.attempt[row] + 1, block.tokens[row], number(block.cost[row]), z, number(block.p_safe[row]), score];
    line.append(...cells.map((text) => make("td", String(text))), make("td", passedOver(block, row) ? "outranked, not charged" : fate, FATES[fate]));
    body.append(line);
  });
  const top = make("thead");
  top.append(head);
  grid.append(make("caption", "Proposals of block " + (block.block + 1), "who"), top, body);
  const scroll = make("div", undefined, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Proposals of block " + (block.block + 1));
  scroll.append(grid);
  details.append(scroll);
  return details;
}

function svg(name, fields, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(fields)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function chart(released) {
  const proposals = state.blocks.flatMap((block) => block.fate.map((fate, row) => (
    { fate, x: block.tokens[row], z: block.budget[row], charged: !passedOver(block, row) })));
  const points = proposals.filter((point) => point.charged);
  const finite = points.filter((point) => point.z !== null);
  const limit = Number($("budget").value);
  const most = Math.max(1, ...points.map((point) => point.x));
  const top = Math.max(limit, 0.1, ...finite.map((point) => point.z));
  const bottom = Math.min(0, ...finite.map((point) => point.z)) - 0.05 * (top + 1);
  const x = (tokens) => 46 + 500 * tokens / most;
  const y = (z) => 12 + 176 * (top - Math.max(z, bottom)) / (top - bottom);
  const marks = [
    svg("line", { class: "axis", x1: 46, y1: 12, x2: 46, y2: 190 }),
    svg("line", { class: "zero", x1: 46, y1: y(0), x2: 550, y2: y(0) }),
    svg("text", { x: 40, y: y(0) + 4, "text-anchor": "end" }, "0"),
    svg("text", { x: 40, y: y(top) + 4, "text-anchor": "end" }, top.toFixed(1)),
    svg("text", { x: 548, y: 212, "text-anchor": "end" }, most + " tokens"),
    svg("text", { x: 46, y: 212 }, "0"),
  ];
  for (const point of points) marks.push(mark(point.fate, x(point.x), y(point.z === null ? bottom : point.z)));
  if (released && released.budget_path[0] !== null) {
    const path = [[0, limit], ...released.block_tokens.map((tokens, at) => [tokens, released.budget_path[at]])];
    marks.push(svg("polyline", { class: "path", points: path.map(([t, z]) => `${x(t)},${y(z)}`).join(" ") }));
  }
  const kept = points.filter((point) => point.fate === "kept").length;
  const title = svg("title", { id: "chart-text" }, `${proposals.length} proposals in ${state.blocks.length} blocks, ${points.length} charged, ${kept} kept; z from ${bottom.toFixed(1)} to ${top.toFixed(1)}. The tables below have all numbers.`);
  $("chart").replaceChildren(title, ...marks);
}

function mark(fate, x, y) {
  const kind = FATES[fate];
  const shapes = { over: `${x},${y - 4} ${x + 4},${y + 4} ${x - 4},${y + 4}`, critic: `${x},${y - 5} ${x + 4},${y} ${x},${y + 5} ${x - 4},${y}` };
  if (shapes[kind]) return svg("polygon", { class: kind, points: shapes[kind] });
  if (kind === "fault") return svg("text", { class: kind, x: x - 4, y: y + 4 }, "✕");
  return svg("circle", { class: kind, cx: x, cy: y, r: 3.5 });
}

$("form").addEventListener("submit", send);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => { if (state.abort) state.abort.abort(); });
$("clear").addEventListener("click", () => {
  if (state.abort) return;
  state.turns = [];
  state.blocks = [];
  $("turns").replaceChildren();
  $("plot").hidden = true;
  $("blocks").replaceChildren();
  $("verdict").replaceChildren(make("p", "Send a message to see how its answer is found."));
  say("");
  $("message").focus();
});
start().catch((error) => { $("about").textContent = "The settings cannot be read: " + error.message; });
