// Charts: plain SVG, redrawn when the window changes its size.
const PLOT = { height: 210, left: 46, right: 8, top: 12, bottom: 24 };
function smooth(values) {
  const alpha = 2 / (Math.max(3, values.length / 20) + 1);
  let state = null;
  return values.map((value) => {
    if (!known(value)) return state;
    state = state === null ? value : state + alpha * (value - state);
    return state;
  });
}
function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
  const ticks = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-6; value += size)
    ticks.push(Math.abs(value) < size * 1e-6 ? 0 : value);
  return ticks;
}
function yScale(chart, rows) {
  const values = rows.flat().filter((v) => known(v) && (!chart.log || v > 0));
  if (!values.length) return null;
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const span = PLOT.height - PLOT.top - PLOT.bottom;
  if (chart.log) {
    let a = Math.floor(Math.log10(low)), b = Math.ceil(Math.log10(high));
    if (a === b) b += 1;
    const stride = Math.ceil((b - a) / 5), ticks = [];
    for (let power = a; power <= b; power += stride) ticks.push(10 ** power);
    const y = (v) => (v > 0 ? PLOT.top + span * (1 - (Math.log10(v) - a) / (b - a)) : null);
    return { y, ticks, format: (v) => "1e" + Math.round(Math.log10(v)) };
  }
  if (chart.zero || chart.stacked) low = Math.min(0, low);
  if (chart.unit && high > .4) high = Math.max(1, high);
  if (high === low) { high += Math.abs(high) * .1 || 1; low -= chart.zero ? 0 : Math.abs(low) * .1; }
  const ticks = niceTicks(low, high, 4);
  high = Math.max(high, ticks[ticks.length - 1]);
  return { y: (v) => PLOT.top + span * (1 - (v - low) / (high - low)), ticks, format: short };
}
function linePath(values, x, y, sparse) {
  let path = "", pen = "M";
  values.forEach((value, index) => {
    const top = known(value) ? y(value) : null;
    if (top === null) { pen = sparse ? pen : "M"; return; }
    path += pen + x(index).toFixed(1) + "," + top.toFixed(1);
    pen = "L";
  });
  return path;
}
function drawChart(host, chart) {
  const old = host.querySelector("svg");
  const width = Math.max(240, host.clientWidth - 32);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${PLOT.height}`, role: "img" });
  const n = STEPS.length, inner = width - PLOT.left - PLOT.right;
  const slot = inner / Math.max(1, n);
  const x = (i) => chart.stacked ? PLOT.left + slot * (i + .5)
    : n === 1 ? PLOT.left + inner / 2 : PLOT.left + inner * i / (n - 1);
  const rows = chart.lines.map((line) => line.values);
  let tops = rows;
  if (chart.stacked) {
    tops = [];
    rows.forEach((row, k) => tops.push(row.map((v, i) => (v || 0) + (k ? tops[k - 1][i] : 0))));
  }
  const scale = yScale(chart, tops);
  if (!scale) return;
  for (const tick of scale.ticks) {
    const y = scale.y(tick);
    plot.append(svg("line", { class: "grid", x1: PLOT.left, x2: width - PLOT.right, y1: y, y2: y }));
    const label = svg("text", { x: PLOT.left - 8, y: y + 4, "text-anchor": "end" });
    label.textContent = scale.format(tick);
    plot.append(label);
  }
  const marks = [...new Set(Array.from({ length: Math.min(n, 6) },
    (_, k) => Math.round(k * (n - 1) / Math.max(1, Math.min(n, 6) - 1))))];
  for (const i of marks) {
    const label = svg("text", { x: x(i), y: PLOT.height - 6, "text-anchor": "middle" });
    label.textContent = STEPS[i];
    plot.append(label);
  }
  chart.lines.forEach((line, k) => {
    const color = `var(--${line.color})`;
    if (chart.stacked) {
      const gap = slot > 6 ? slot * .18 : 0;
      let path = "";
      for (let i = 0; i < n; i++) {
        const upper = scale.y(tops[k][i]), lower = scale.y(k ? tops[k - 1][i] : 0);
        if (lower - upper < .05) continue;
        const left = (x(i) - slot / 2 + gap / 2).toFixed(2), w = (slot - gap).toFixed(2);
        path += `M${left},${lower.toFixed(1)}v${(upper - lower).toFixed(1)}h${w}` +
          `v${(lower - upper).toFixed(1)}z`;
      }
      plot.append(svg("path", { d: path, fill: color }));
      return;
    }
    const faint = chart.smooth && n > 4;
    plot.append(svg("path", { d: linePath(line.values, x, scale.y, chart.sparse), fill: "none",
      stroke: color, "stroke-width": faint ? 1 : 1.75, opacity: faint ? .3 : 1, "stroke-linejoin": "round" }));
    if (faint) plot.append(svg("path", { d: linePath(smooth(line.values), x, scale.y), fill: "none",
      stroke: color, "stroke-width": 2.25, "stroke-linejoin": "round" }));
    const points = line.values.map((v, i) => [v, i]).filter(([v]) => known(v));
    if (points.length <= 24 && !faint) for (const [v, i] of points)
      if (scale.y(v) !== null) plot.append(svg("circle", { cx: x(i), cy: scale.y(v), r: 2.5, fill: color }));
  });
  hover(host, plot, chart, x, width);
  if (old) old.replaceWith(plot); else host.append(plot);
}
function hover(host, plot, chart, x, width) {
  const tip = host.querySelector(".tip");
  const cursor = svg("line", { class: "grid", y1: PLOT.top, y2: PLOT.height - PLOT.bottom, visibility: "hidden" });
  plot.append(cursor);
  plot.addEventListener("pointerleave", () => {
    tip.style.display = "none";
    cursor.setAttribute("visibility", "hidden");
  });
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) * width / box.width;
    let best = 0;
    for (let i = 1; i < STEPS.length; i++) if (Math.abs(x(i) - at) < Math.abs(x(best) - at)) best = i;
    tip.replaceChildren(el("div", "", "step " + STEPS[best]));
    for (const line of chart.lines) {
      const row = el("div"), mark = el("i");
      mark.style.background = `var(--${line.color})`;
      row.append(mark, line.label + ": " + short(line.values[best]));
      tip.append(row);
    }
    tip.style.display = "block";
    const left = plot.offsetLeft || 16, px = left + x(best) * box.width / width;
    tip.style.left = (px > host.clientWidth / 2 ? px - tip.offsetWidth - 12 : px + 12) + "px";
    tip.style.top = "64px";
    cursor.setAttribute("x1", x(best));
    cursor.setAttribute("x2", x(best));
    cursor.setAttribute("visibility", "visible");
  });
}
function chartSpecs() {
  const line = (name, label, color) => ({ values: SERIES[name] || [], label, color });
  const sampled = SERIES["tokens/sampled"] || [], seconds = SERIES["time/step_s"] || [];
  const speed = sampled.map((v, i) => (known(v) && seconds[i] ? v / seconds[i] : null));
  const phases = [["rollout", "s1"], ["score", "s2"], ["train", "s3"], ["sync", "s4"]]
    .map(([phase, color]) => line(`time/${phase}_s`, phase, color));
  const rest = seconds.map((total, i) => (known(total)
    ? Math.max(0, total - phases.reduce((sum, p) => sum + (p.values[i] || 0), 0)) : null));
  return [
    { title: "Reward", note: "mean over scored episodes; thin: each step, thick: smoothed", unit: true,
      zero: true, smooth: true, lines: [line("reward/total", "total", "s1"),
        line("reward/accuracy", "accuracy", "s2"), line("reward/format", "format", "s3")] },
    { title: "Supervised loss", note: "cross entropy, nat per token", zero: true, smooth: true,
      lines: [line("loss/sft", "loss", "s1")] },
    { title: "Evaluation", note: "on the evaluation set", unit: true, zero: true, sparse: true,
      lines: [line("eval/reward/total", "total", "s1"), line("eval/reward/accuracy", "accuracy", "s2")] },
    { title: "Engine-trainer mismatch", note: "difference of log-probs, nat, log scale", log: true,
      lines: [line("mismatch/abs_logprob", "mean", "s1"), line("mismatch/max", "max", "s5")] },
    { title: "Time per step", note: "seconds by phase", stacked: true,
      lines: [...phases, { values: rest, label: "other", color: "s6" }] },
    { title: "Throughput", note: "sampled tokens per second of the whole step", zero: true,
      lines: [{ values: speed, label: "tokens/s", color: "s1" }] },
    { title: "Entropy", note: "of the policy, nat per token", zero: true,
      lines: [line("policy/entropy", "entropy", "s4")] },
    { title: "Gradient norm", note: "before clipping", zero: true,
      lines: [line("optim/grad_norm", "grad norm", "s3")] },
    { title: "Workers per planner", note: "mean over scored episodes", zero: true,
      lines: [line("rollout/workers_per_planner", "workers", "s2")] },
  ];
}
function charts() {
  const drawn = [];
  for (const chart of chartSpecs()) {
    chart.lines = chart.lines.filter((line) => line.values.some((v) => known(v) && (v !== 0 || !(chart.log || chart.stacked))));
    if (!chart.lines.length) continue;
    const host = el("section", "chart");
    host.append(el("h3", "", chart.title), el("div", "note", chart.note));
    if (chart.lines.length > 1) {
      const legend = el("div", "legend");
      for (const line of chart.lines) {
        const item = el("span"), mark = el("i");
        mark.style.background = `var(--${line.color})`;
        item.append(mark, line.label);
        legend.append(item);
      }
      host.append(legend);
    }
    host.append(el("div", "tip"));
    $("charts").append(host);
    drawn.push([host, chart]);
  }
  // Only now: the width of a card depends on how many there are.
  const draw = () => drawn.forEach(([host, chart]) => drawChart(host, chart));
  draw();
  if (!drawn.length) $("charts").append(el("div", "panel empty", "No training step is finished yet."));
  let timer;
  addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(draw, 100);
  });
}
