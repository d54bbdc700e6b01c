// Conversations: steps, their episodes, and the tree of turns of one episode.
function rewardBadge(episode) {
  if (!known(episode.total)) return el("span", "badge bad", "failed");
  const tone = episode.accuracy >= 1 ? " good" : episode.accuracy <= 0 ? " bad" : "";
  return el("span", "badge" + tone, "reward " + short(episode.total));
}
const MARKS = /(<use_mcp_tool>[\s\S]*?(?:<\/use_mcp_tool>|$))|(<think>[\s\S]*?(?:<\/think>|$))|(<\|[^|<>]{1,40}\|>)/g;
function textBlock(text) {
  const block = el("pre", "text");
  let done = 0;
  for (const match of text.matchAll(MARKS)) {
    block.append(text.slice(done, match.index));
    block.append(el("span", match[1] ? "call" : match[2] ? "think" : "special", match[0]));
    done = match.index + match[0].length;
  }
  block.append(text.slice(done));
  return block;
}
const LABELS = { model: "sampled", environment: "environment", prompt: "prompt" };
function turnNode(turn, who, number) {
  const [kind, text, tokens] = turn;
  const node = el(kind === "prompt" ? "details" : "div", "turn " + kind);
  const head = el(kind === "prompt" ? "summary" : "div", "head");
  head.append(el("b", "", kind === "model" ? who + ", turn " + number : LABELS[kind] || kind));
  head.append(kind === "model" ? "sampled and trained" : kind === "environment" ? "given, not trained" : "");
  head.append(el("span", "grow"), (tokens || 0).toLocaleString("en") + " tokens");
  node.append(head, textBlock(TEXTS[text]));
  return node;
}
function trajectoryNodes(trajectory, workers) {
  const nodes = [], waiting = workers.slice();
  let number = 0;
  const spawned = (turn) => {
    for (let i = 0; i < waiting.length; )
      if (turn === null || waiting[i].spawn_turn === turn) nodes.push(workerNode(waiting.splice(i, 1)[0]));
      else i++;
  };
  for (const turn of trajectory.turns) {
    if (turn[0] === "model") number += 1;
    nodes.push(turnNode(turn, trajectory.agent || trajectory.role, number));
    if (turn[0] === "model") spawned(number);
  }
  spawned(null);
  return nodes;
}
function statusBadge(status) {
  return el("span", "badge plain" + (status === "answered" ? "" : " bad"), String(status).replaceAll("_", " "));
}
function workerNode(worker) {
  const node = el("details", "nested worker"), summary = el("summary"), body = el("div", "body");
  summary.append(el("b", "", worker.agent || "worker"), ": " + (TEXTS[worker.subtask] || "(no subtask)"));
  summary.append(statusBadge(worker.status), el("span", "badge plain", "format " + short(worker.format)));
  if (TEXTS[worker.error]) body.append(el("div", "sub", TEXTS[worker.error]));
  body.append(...trajectoryNodes(worker, []));
  node.append(summary, body);
  return node;
}
function showEpisode(episode) {
  const host = $("conversation"), facts = el("dl", "facts"), badges = el("div", "badges");
  const fact = (name, value) => { if (value) facts.append(el("dt", "", name), el("dd", "", value)); };
  fact("Question", TEXTS[episode.question]);
  fact("Truth", TEXTS[episode.ground_truth]);
  fact("Answer", TEXTS[episode.answer] || "(none found)");
  fact("Failure", TEXTS[episode.failure] || TEXTS[episode.planner.error]);
  const planner = episode.planner;
  badges.append(rewardBadge(episode), statusBadge(planner.status));
  for (const [name, value] of [["accuracy", episode.accuracy], ["format", planner.format],
    ["advantage", episode.advantage]])
    if (known(value)) badges.append(el("span", "badge plain", name + " " + short(value)));
  badges.append(el("span", "badge plain", counted(episode.workers.length, "worker")));
  if (planner.versions && planner.versions.length)
    badges.append(el("span", "badge plain", "weights v" + planner.versions.join(", v")));
  if (known(episode.duration_s)) badges.append(el("span", "badge plain", duration(episode.duration_s)));
  badges.append(el("span", "badge plain", "sample " + episode.sample));
  const body = el("div", "planner");
  body.append(...trajectoryNodes(planner, episode.workers));
  host.replaceChildren(facts, badges, body);
}
function showStep(step) {
  for (const pill of $("steps").children)
    pill.setAttribute("aria-pressed", pill.dataset.step === String(step.step));
  const list = $("list");
  list.replaceChildren();
  step.episodes.forEach((episode, index) => {
    const row = el("button", "row"), meta = el("div", "m");
    row.type = "button";
    meta.append(rewardBadge(episode), counted(episode.workers.length, "worker"));
    if (episode.planner.status !== "answered") meta.append(statusBadge(episode.planner.status));
    row.append(meta, el("div", "q", TEXTS[episode.question]));
    row.addEventListener("click", () => {
      for (const other of list.children) other.removeAttribute("aria-current");
      row.setAttribute("aria-current", "true");
      showEpisode(episode);
    });
    list.append(row);
    if (!index) row.click();
  });
  list.append(el("div", "row sub", `${step.episodes.length} of ${step.num_episodes} episodes, ` +
    "over the whole range of rewards"));
}
function conversations() {
  const steps = DATA.conversations.steps;
  if (!steps.length) {
    $("browser").replaceWith(el("div", "panel empty", "No conversation is recorded (obs.record_rollouts)."));
    return;
  }
  for (const step of steps) {
    const pill = el("button", "pill", "Step " + step.step);
    pill.type = "button";
    pill.dataset.step = step.step;
    pill.addEventListener("click", () => showStep(step));
    $("steps").append(pill);
  }
  showStep(steps[steps.length - 1]);
}
