// Shows what the WebSocket /live sends: {policy?, plan?, status}, each as page_events.py says.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const TIMES = 120; // plans of the latency curve
const PALETTE = [[22, 11, 57], [87, 16, 110], [165, 44, 96], [226, 89, 51], [252, 165, 10], [246, 245, 146]];
const GLOW = Array.from({ length: 256 }, (_, i) => { // [strength, colour] of each level
  const at = i / 255 * (PALETTE.length - 1), k = Math.min(Math.floor(at), PALETTE.length - 2);
  return [i / 255, PALETTE[k].map((c, j) => c + (PALETTE[k + 1][j] - c) * (at - k))];
});
const ranges = []; // [low, high] of each chart, which only grows
const times = [];
let policy = null, plan = null, layer = "", follow = null, socket = null, wait = 1000, timer = 0, done = null;

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function draw(kind, name) {
  const node = document.createElementNS(SVG, kind);
  node.setAttribute("class", name);
  return node;
}

const number = (value) => value === null || value === undefined ? "–"
  : Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
const ms = (value) => value === undefined ? "–"
  : value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : value.toFixed(0);
const ago = (s) => s < 2 ? "now" : s < 120 ? `${Math.round(s)} s ago` : `${Math.round(s / 60)} min ago`;
const sum = (list) => list.reduce((a, b) => a + b, 0);

// ---- the policy: once -------------------------------------------------------------------------

function showPolicy() {
  $("name").textContent = policy.config || "policy";
  $("step").textContent = [policy.step === null ? "" : `step ${policy.step}`, policy.embodiment]
    .filter(Boolean).join(" · ");
  document.title = `${policy.config || "policy"}, live`;
  $("shown").textContent = `canvas ${policy.canvas.join(" × ")}`;
  for (const labels of document.querySelectorAll(".labels")) {
    labels.replaceChildren(...policy.cameras.map((camera) => {
      const label = make("span", camera.name);
      label.style.left = `${100 * camera.left}%`;
      label.style.top = `${100 * camera.top}%`;
      return label;
    }));
  }
  for (const id of ["sees", "looks"]) $(id).style.aspectRatio = `${policy.canvas[1]} / ${policy.canvas[0]}`;
  $("untapped").hidden = policy.taps;
  $("untapped").firstElementChild.replaceChildren(...(policy.attends
    ? ["Start the server with ", make("code", "--taps"), " to see it."]
    : ["This policy has no learned queries whose attention could be shown."]));
  $("charts").replaceChildren(...policy.dims.map(chart));
}

function chart(dim, index) {
  ranges[index] = dim.low !== null && dim.high !== null ? [dim.low, dim.high] : [Infinity, -Infinity];
  const box = make("div", undefined, `chart ${dim.kind}`);
  const head = make("header"), plot = make("div", undefined, "plot"), foot = make("footer");
  const value = make("output", "–");
  head.append(make("b", dim.name), make("span", dim.kind), value);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  for (const name of ["frame", "zero", "limit", "next", "old", "new", "dots"]) svg.append(draw("path", name));
  plot.append(svg, make("small", "", "top"), make("small", "", "bottom"));
  const last = policy.horizon - 1, seconds = policy.fps ? `, ${(last / policy.fps).toFixed(1)} s` : "";
  foot.append(make("span", "now"), make("span", `step ${last}${seconds}`));
  box.append(head, plot, foot);
  return box;
}

// ---- a plan -----------------------------------------------------------------------------------

function showPlan() {
  $("prompt").textContent = `“${plan.prompt}”`;
  $("refused").hidden = plan.code === "ok";
  $("refused").textContent = `No plan was sent. ${plan.code}: ${plan.message}`;
  const t = plan.times;
  $("times").textContent = `queue ${ms(t.queue_ms)} · policy ${ms(t.infer_ms)} · all ${ms(t.total_ms)}`;
  $("times").title = $("times").textContent;
  times.push(t.total_ms);
  if (times.length > TIMES) times.shift();
  const top = [...times].sort((a, b) => a - b)[Math.floor(0.97 * (times.length - 1))]; // but for the worst
  const width = 120 / Math.max(times.length - 1, 20);
  const at = (v, i) => `${i * width} ${27 - 25 * Math.min(v / top, 1)}`;
  $("spark").firstChild.setAttribute("d", `M${times.map(at).join("L")}`);
  showLegend();
  policy.dims.forEach(showChart);
  const image = new Image();
  image.onload = () => { showSees(image); if (policy.taps) showLooks(image); };
  image.src = plan.picture;
}

function showLegend() {
  const entry = (name, text) => {
    const span = make("span");
    span.append(make("i", undefined, name), text);
    return span;
  };
  const entries = [entry("", "this plan")];
  if (policy.dims.some((dim) => dim.kind === "gripper")) entries.push(entry("grip", "gripper"));
  if (plan.before) {
    const shift = plan.before.shift;
    entries.push(entry("old", shift === null ? "plan before, not aligned: requests have no step"
      : `plan before, made ${shift} step${shift === 1 ? "" : "s"} earlier`));
  }
  entries.push(entry("next", `recommended next request, step ${policy.replan}`));
  $("legend").replaceChildren(...entries);
}

function showChart(dim, index) {
  const box = $("charts").children[index], part = (name) => box.querySelector(`path.${name}`);
  const values = (plan.actions || []).map((row) => row[index]);
  const before = plan.before ? plan.before.actions.map((row) => row[index]) : [];
  const range = ranges[index];
  for (const value of [...values, ...before]) {
    range[0] = Math.min(range[0], value);
    range[1] = Math.max(range[1], value);
  }
  const pad = 0.06 * (range[1] - range[0]) || 1e-3, low = range[0] - pad, high = range[1] + pad;
  const x = (step) => 100 * step / Math.max(policy.horizon - 1, 1);
  const y = (value) => (100 * (high - value) / (high - low)).toFixed(2);
  const level = (value) => value !== null && value >= low && value <= high ? `M0 ${y(value)}H100` : "";
  part("frame").setAttribute("d", "M0 0V100H100");
  part("zero").setAttribute("d", level(0));
  part("limit").setAttribute("d", level(dim.low) + level(dim.high));
  part("next").setAttribute("d", policy.replan < policy.horizon ? `M${x(policy.replan)} 0V100` : "");
  const isGripper = dim.kind === "gripper";
  const curve = (list, shift) => list.map((v, i) => [i - shift, v]).filter(([step]) => step >= 0)
    .map(([step, v], i) => (i === 0 ? `M${x(step)} ${y(v)}` : isGripper ? `H${x(step)}V${y(v)}` : `L${x(step)} ${y(v)}`))
    .join("");
  part("old").setAttribute("d", curve(before, plan.before ? plan.before.shift || 0 : 0));
  part("new").setAttribute("d", curve(values, 0));
  part("dots").setAttribute("d", values.map((v, i) => `M${x(i)} ${y(v)}h0`).join(""));
  box.querySelector("output").textContent = number(values[0]);
  box.querySelector(".top").textContent = number(range[1]);
  box.querySelector(".bottom").textContent = number(range[0]);
}

function fill(canvas, width, height) {
  canvas.width = width;
  canvas.height = height;
  return canvas.getContext("2d", { willReadFrequently: true });
}

function showSees(image) {
  fill($("sees"), image.width, image.height).drawImage(image, 0, 0);
}

// What is looked at keeps its colours and glows; the rest turns grey and dark.
function showLooks(image) {
  const names = Object.keys(plan.attention);
  showLayers(names);
  if (!names.length) return;
  const used = names.includes(layer) ? [layer] : names;
  const [rows, columns] = plan.attention[used[0]].size;
  const mean = (i) => sum(used.map((name) => plan.attention[name].cells[i])) / used.length;
  const cells = plan.attention[used[0]].cells.map((_, i) => mean(i));
  const top = Math.max(3, ...cells); // indifferent attention looks indifferent
  const small = document.createElement("canvas"), heat = fill(small, columns, rows);
  const shares = heat.createImageData(columns, rows);
  cells.forEach((cell, i) => {
    const strength = Math.min(Math.max((cell - 0.5) / (top - 0.5), 0), 1);
    shares.data.set([255 * strength, 0, 0, 255], 4 * i);
  });
  heat.putImageData(shares, 0, 0);
  const scale = Math.max(1, Math.round(480 / image.width));
  const out = fill($("looks"), scale * image.width, scale * image.height);
  const read = () => out.getImageData(0, 0, out.canvas.width, out.canvas.height);
  out.imageSmoothingQuality = "high";
  out.drawImage(small, 0, 0, out.canvas.width, out.canvas.height);
  const smooth = read().data;
  out.imageSmoothingEnabled = scale === 1;
  out.drawImage(image, 0, 0, out.canvas.width, out.canvas.height);
  const pixels = read(), rgb = pixels.data;
  for (let i = 0; i < rgb.length; i += 4) {
    const [strength, glow] = GLOW[smooth[i]], grey = 0.2 * (rgb[i] + rgb[i + 1] + rgb[i + 2]);
    const alpha = 0.6 * Math.sqrt(strength);
    for (let j = 0; j < 3; j++) {
      const colour = grey + (rgb[i + j] - grey) * strength;
      rgb[i + j] = colour + (glow[j] - colour) * alpha;
    }
  }
  out.putImageData(pixels, 0, 0);
}

function showLayers(names) {
  if ($("layers").dataset.names === names.join()) return;
  $("layers").dataset.names = names.join();
  $("layers").replaceChildren(...["", ...names].map((name) => {
    const [number, source] = name.split("_", 2);
    const button = make("button", name ? `layer ${number}${source === "adapted" ? "" : `, ${source}`}` : "all layers");
    button.setAttribute("aria-pressed", name === layer);
    button.onclick = () => {
      layer = name;
      $("layers").dataset.names = "";
      showPlan();
    };
    return button;
  }));
  if (!names.length) $("layers").replaceChildren("this policy has no learned queries");
}

// ---- the status, every second ----------------------------------------------------------------

function showStatus(status) {
  const isReady = status.health === "OK";
  $("health").textContent = isReady ? "ready" : status.health;
  $("health").className = `pill ${isReady ? "on" : "off"}`;
  const { p50_ms: p50, p95_ms: p95 } = status.latency;
  $("latency").textContent = p50 === undefined ? "–" : `${ms(p50)} / ${ms(p95)} ms`;
  $("sessions").textContent = status.sessions.length;
  $("queue").textContent = status.queue ? `${status.queue} waiting` : "";
  const now = performance.now(), ok = status.codes.ok || 0;
  if (done === null || now - done.at > 1900) {
    if (done) $("rate").textContent = (1000 * (ok - done.ok) / (now - done.at)).toFixed(1);
    done = { ok, at: now };
  }
  showGuard(status.guard);
  const errors = sum(Object.values(status.codes)) - ok;
  $("errors").textContent = `${errors}, ${status.warnings}`;
  $("errors").title = Object.entries(status.codes).map(([code, n]) => `${code} ${n}`).join(", ");
  showRobots(status.sessions);
  if (follow !== null && !status.sessions.some((each) => each.number === follow)) {
    follow = null; // it hung up
    connect();
  }
  const notes = status.notes.map((note) => row(`#${note.session}`, make("span", note.text), ago(note.age_s)));
  $("notes").replaceChildren(...(notes.length ? notes : [make("li", "none", "none")]));
}

function showGuard(guard) {
  const all = Object.entries(guard).map(([kind, dims]) => [kind, dims, sum(dims)]);
  $("guard").textContent = sum(all.map((each) => each[2]));
  $("guard").title = all.map(([kind, dims, count]) => `${kind} ${count}: by dimension ${dims.join(" ")}`).join("\n");
  if (!policy) return;
  policy.dims.forEach((dim, index) => {
    const kinds = all.filter(([, dims]) => dims[index]).map(([kind, dims]) => `${dims[index]} ${kind}`);
    $("charts").children[index].querySelector("header span").textContent = [dim.kind, ...kinds].join(" · ");
  });
}

function showRobots(sessions) {
  const button = (text, session) => {
    const node = make("button", text);
    node.setAttribute("aria-pressed", follow === session);
    node.onclick = () => { follow = session; plan = null; connect(); };
    return node;
  };
  const rows = sessions.map((each) => row(button(`#${each.number}`, each.number),
    make("span", each.prompt ? `${each.requests} requests, “${each.prompt}”` : "no request yet"),
    each.age_s === undefined ? "" : ago(each.age_s)));
  const newest = row(button("latest plan of any", null), make("span"), "");
  // A click must not miss because the list was made anew under the pointer.
  if (!$("robots").matches(":active")) $("robots").replaceChildren(newest, ...rows);
}

function row(first, middle, last) {
  const item = make("li");
  item.append(first, middle, make("span", last));
  return item;
}

// ---- the stream -------------------------------------------------------------------------------

function connect() {
  clearTimeout(timer);
  if (socket) {
    socket.onclose = null;
    socket.close();
  }
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(`${scheme}//${location.host}/live${follow === null ? "" : `?session=${follow}`}`);
  socket.onmessage = ({ data }) => {
    const said = JSON.parse(data);
    wait = 1000;
    if (said.policy) { policy = said.policy; showPolicy(); }
    if (said.plan && policy) { plan = said.plan; showPlan(); }
    showStatus(said.status);
  };
  socket.onclose = ({ reason }) => {
    $("health").textContent = reason || "no connection";
    $("health").className = "pill off";
    if (!document.hidden) timer = setTimeout(connect, wait);
    wait = Math.min(2 * wait, 10000);
    done = null;
  };
}

// Nothing is made for a page that nobody looks at.
document.addEventListener("visibilitychange", () => document.hidden ? socket.close() : connect());
connect();
