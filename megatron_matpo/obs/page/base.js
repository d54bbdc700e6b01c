"use strict";
// Text from models and tools enters the page through textContent only, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SERIES = DATA.series, STEPS = SERIES.step || [], TEXTS = DATA.conversations.texts;
const $ = (id) => document.getElementById(id);
function el(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
}
function svg(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  return node;
}
const counted = (count, noun) => count + " " + noun + (count === 1 ? "" : "s");
const known = (value) => value !== null && value !== undefined;
function short(value) {
  if (!known(value)) return "-";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
function duration(seconds) {
  const total = Math.round(seconds), h = Math.floor(total / 3600), m = Math.floor(total / 60) % 60;
  if (h >= 48) return (h / 24).toFixed(1) + " days";
  return h ? h + " h " + m + " min" : m ? m + " min " + (total % 60) + " s" : total + " s";
}
function lastOf(name) {
  return (SERIES[name] || []).reduce((found, value) => (known(value) ? value : found), null);
}

// Theme: the reader's system decides until the button is used.
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
}
setTheme(location.hash === "#dark" || (location.hash !== "#light" &&
  matchMedia("(prefers-color-scheme: dark)").matches));
$("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme !== "dark"));

function header() {
  $("name").textContent = DATA.run;
  $("when").textContent = "megatron_matpo run, report of " + DATA.written;
  const tile = (value, label) => {
    const node = el("div", "tile");
    node.append(el("b", "", value), el("span", "", label));
    $("tiles").append(node);
  };
  const step = STEPS.length ? STEPS[STEPS.length - 1] : 0;
  tile(DATA.planned_steps ? step + " / " + DATA.planned_steps : String(step), "training steps");
  const share = (value) => (known(value) ? (100 * value).toFixed(1) + "%" : "-");
  // A supervised run has no rewards.
  if (known(lastOf("loss/sft"))) tile(short(lastOf("loss/sft")), "loss, last step");
  if (known(lastOf("reward/total"))) tile(short(lastOf("reward/total")), "reward, last step");
  if (known(lastOf("reward/accuracy"))) tile(share(lastOf("reward/accuracy")), "accuracy, last step");
  if (SERIES["eval/reward/accuracy"]) tile(share(lastOf("eval/reward/accuracy")), "eval accuracy");
  const mismatch = lastOf("mismatch/abs_logprob");
  if (known(mismatch)) tile(short(mismatch), "log-prob mismatch, nat");
  tile(short(DATA.totals.sampled || DATA.totals.trained),
    DATA.totals.sampled ? "tokens sampled" : "tokens trained");
  tile(duration(DATA.totals.step_s), "in steps");
  for (const [name, value] of DATA.config) {
    const chip = el("span", "chip", name);
    chip.append(el("b", "", value));
    $("config").append(chip);
  }
}
