// The page: state from the server in, controls out, one painting a display frame.

import { DriftView, LedgerView, Percentiles } from "./charts.js";
import { Input } from "./input.js";
import { Stage } from "./picture.js";
import { FLAG, decode, developed } from "./protocol.js";
import { Socket } from "./socket.js";

const $ = (id) => document.getElementById(id);
const set = (id, text) => {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
};
const known = (value, show) => (Number.isFinite(value) ? show(value) : "–");

const stage = new Stage({ imagined: $("imagined"), overlay: $("overlay"), truth: $("truth"), diff: $("diff") });
const ledger = new LedgerView({ bar: $("bar"), body: $("stages"), canvas: $("frames") });
const drift = new DriftView($("drift"));
const presses = new Percentiles(500);

let hello = null; // what this world is
let status = null; // what the session is doing
let developing = Promise.resolve(); // encoded frames, in the order in which they came
const waiting = []; // frames to paint, one a refresh
let painted = null;
const sentTimes = new Set(); // of edges that no painted frame has shown yet
let behindUntil = 0;
let differs = null;
let verifying = null;
let charted = 0;
let turn = 0;
const paints = [];
const MOST = 120; // pictures a second; no display that is common shows more, and each costs the server a wake
const MAX_WAITING = 2; // two that came between two refreshes are both seen, unless more follow

// ---- server to page

const socket = new Socket({
  onOpen: tellVisible,
  onFrame(buffer) {
    const frame = decode(buffer);
    if (frame.type === null) take(frame);
    else {
      const soon = developed(frame); // several at once, taken in the order in which they came
      developing = developing.then(() => soon).then(take, (error) => veil(true, "A picture could not be decoded", String(error), true));
    }
  },
  onEvent(event) {
    handlers[event.t]?.(event);
    refresh();
  },
  onGone({ code, reason, wait }) {
    status = null;
    refresh();
    const refused = code === 1008 || code === 1003 || code === 1009;
    veil(true, refused ? "The server closed this page" : "Server gone", `${reason || "The connection ended."} Trying again in ${wait / 1000} s.`, true);
  },
});

function tellVisible() {
  socket.send({ t: "visible", on: !document.hidden, most: MOST });
}

function take(frame) {
  if (painted && frame.dropped > painted.dropped) behindUntil = performance.now() + 1500;
  ledger.add(frame, frame.flags & FLAG.missed);
  drift.add({ radius: frame.radius, error: frame.error, anchored: frame.flags & FLAG.anchored });
  stage.follow(frame.target, frame.flags & FLAG.first);
  waiting.push(frame);
  if (waiting.length > MAX_WAITING) waiting.shift();
  document.dispatchEvent(new CustomEvent("worldline:frame", { detail: { id: frame.id, time: performance.now(), busy: frame.busy, missed: frame.missed, unattributed: frame.spans.at(-1) } }));
}

const handlers = {
  hello(event) {
    hello = event;
    differs = verifying = null;
    sentTimes.clear();
    waiting.length = 0;
    painted = null;
    ledger.begin(event.stages);
    drift.clear();
    presses.clear();
    document.title = `${event.model} · worldline`;
    $("seed").value = event.seed;
    const paces = [
      [event.fps / 2, `${(event.fps / 2).toFixed(1)} half speed`],
      [event.fps, `${event.fps.toFixed(0)} real time`],
      [60, "60"],
      [0, "max"],
    ].filter(([fps], i) => i < 2 || fps !== event.fps);
    $("pace").replaceChildren(...paces.map(([fps, text]) => new Option(text, fps)));
    set("horizon", event.horizon_seconds === null ? "n/a" : `${event.horizon_seconds.toFixed(1)} s`);
    set("snapshot", `snapshot every ${event.snapshot_every} frames`);
    $("help-keys").textContent = event.control === "target" ? "move the agent's target at a steady speed" : "push the agent in that direction";
    $("help-pointer").textContent = event.control === "target" ? "the target follows the pointer" : "push from where you pressed towards the pointer";
  },
  status(event) {
    if (status && status.player !== event.player) announce(event.player ? "You play now." : "You are watching.");
    if (status?.seed !== event.seed) $("seed").value = event.seed;
    status = event;
  },
  verify({ done, total }) {
    verifying = { done, total };
    verdict(total ? `verifying ${done.toLocaleString("en")} of ${total.toLocaleString("en")} frames` : "verifying in another process", "");
  },
  verified({ equal, text }) {
    verifying = null;
    differs = equal ? null : text;
    verdict(text, equal ? "equal" : "differs");
    announce(text);
  },
  saved({ name, frames }) {
    verdict(`${frames.toLocaleString("en")} frames in ${name}`, "");
    announce(`Recorded ${frames} frames.`);
  },
  recordings({ files }) {
    const items = files.map(({ name, bytes, time }) => {
      const item = document.createElement("li");
      const label = document.createElement("span");
      label.textContent = `${name} · ${(bytes / 1e6).toFixed(1)} MB · ${time}`;
      const play = document.createElement("button");
      play.textContent = "Play";
      play.onclick = () => {
        socket.send({ t: "open", name });
        $("files").close();
      };
      const check = document.createElement("button");
      check.textContent = "Verify";
      check.onclick = () => {
        socket.send({ t: "verify", name });
        $("files").close();
      };
      item.append(label, play, check);
      return item;
    });
    if (!items.length) {
      const item = document.createElement("li");
      item.textContent = "No recordings yet: press Record, play, and press it again.";
      items.push(item);
    }
    $("file-list").replaceChildren(...items);
    if (!$("files").open) $("files").showModal();
  },
  note({ text }) {
    note(text);
  },
};

// ---- what the page shows

const STATES = {
  connecting: "connecting",
  live: "live",
  watching: "watching",
  paused: "paused",
  behind: "behind",
  replaying: "replaying",
  verifying: "verifying",
  differs: "differs",
  gone: "server gone",
};

function currentState() {
  if (!status) return socket.attempt ? "gone" : "connecting";
  if (status.state === "paused") return "paused";
  if (differs) return "differs";
  if (verifying) return "verifying";
  if (status.state === "replaying") return "replaying";
  if (ledger.behind || performance.now() < behindUntil) return "behind";
  return status.player ? "live" : "watching";
}

let shownState = "connecting";

function refresh() {
  const state = currentState();
  document.body.dataset.state = state === "watching" ? "live" : state;
  set("state", STATES[state]);
  if (state !== shownState && state !== "behind" && shownState !== "behind") announce(STATES[state]);
  shownState = state;
  if (!hello || !status) {
    if (state === "connecting") veil(true, "Connecting", "Opening the world…", false);
    return;
  }
  const { player, recording, truth, replay } = status;
  const pace = status.fps === 0 ? "max" : `${(status.fps / hello.fps).toFixed(1)}x`;
  set("about", [hello.model, ...(hello.sessions > 1 ? [`session ${hello.session} of ${hello.sessions}`] : []), hello.device, hello.dtype, `seed ${status.seed}`, pace, ...(status.viewers > 1 ? [`${status.viewers} pages`] : [])].join(" · "));
  if (document.activeElement !== $("pace")) $("pace").value = String(status.fps);
  for (const id of ["record", "pace", "seed", "truth-on", "open", "verify"]) $(id).disabled = !player;
  $("reset-form").querySelector("button").disabled = !player;
  $("anchor").disabled = !player || !hello.can_anchor || !truth.on || Boolean(replay);
  $("record").disabled = !player || Boolean(replay);
  $("verify").disabled = !player || Boolean(verifying) || !status.last || Boolean(recording);
  $("open").textContent = replay ? "Play on" : "Open";
  $("truth-on").checked = truth.on;
  $("truth-on").disabled = !player || !truth.available;
  set("truth-empty", truth.available ? "The true world is off." : truth.why);
  $("truth-empty").hidden = truth.on;
  $("truth").hidden = !truth.on;
  const difference = truth.on && $("diff-on").checked;
  $("diff").hidden = !difference;
  $("diff-empty").hidden = difference;
  set("diff-empty", truth.on ? "The difference is off." : "No truth, no difference.");
  $("record").setAttribute("aria-pressed", String(Boolean(recording)));
  if (!recording) set("record-label", "Record");
  const save = $("save");
  save.setAttribute("aria-disabled", String(!status.last || Boolean(recording)));
  if (status.last) {
    save.href = `recordings/${encodeURIComponent(status.last)}${location.search}`;
    save.download = status.last;
  } else save.removeAttribute("href");
  $("verify-progress").hidden = !verifying;
  if (verifying) $("verify-progress").value = verifying.total ? verifying.done / verifying.total : 0;
  if (status.state === "paused") veil(true, "Paused", document.hidden ? "This tab is hidden." : "The player's tab is hidden.", false);
  else if (!painted) veil(true, "Opening", "Waiting for the first frame.", false);
  else veil(false);
}

function veil(shown, title = "", text = "", retry = false) {
  $("veil").classList.toggle("shown", shown);
  if (!shown) return;
  set("veil-title", title);
  set("veil-text", text);
  $("retry").hidden = !retry;
}

function verdict(text, kind) {
  set("verdict", text);
  $("verdict").className = kind;
}

let noteTimer = 0;
function note(text) {
  $("note").textContent = text;
  $("note").hidden = false;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => ($("note").hidden = true), 8000);
}

function announce(text) {
  set("announce", text);
}

function trustWords(frame, share) {
  if (!Number.isFinite(frame.radius)) return "No gauge: this world was saved without one";
  if (frame.flags & FLAG.outside) return "Outside what it has seen: do not trust it";
  if (share < 0.9) return "Back inside, after a spell outside";
  if (frame.radius > 0.85) return "Near the edge of what it has seen";
  return "Inside what it has seen";
}

function showNumbers(frame) {
  const share = drift.insideShare;
  const outside = Boolean(frame.flags & FLAG.outside);
  set("frame-id", frame.id.toLocaleString("en"));
  set("fps", paints.length.toFixed(1));
  set("dropped", frame.dropped.toLocaleString("en"));
  if (status?.recording) set("record-label", `Stop ${(status.recording.first === null ? 0 : frame.id - status.recording.first).toLocaleString("en")}`);
  set("trust-words", trustWords(frame, share));
  set("radius", known(frame.radius, (value) => value.toFixed(2)));
  set("inside", known(share, (value) => `${Math.round(100 * value)} %`));
  set("cycle", known(frame.cycle, (value) => value.toFixed(2)));
  set("error", known(frame.error, (value) => `${(100 * value).toFixed(1)} %`));
  $("hero").classList.toggle("outside", outside);
  $("outside").hidden = !outside;
  $("meter").classList.toggle("outside", outside);
  $("meter").setAttribute("aria-valuenow", known(frame.radius, (value) => value.toFixed(2)));
  $("meter-fill").style.transform = `scaleX(${Math.min(1, (frame.radius || 0) / 2)})`;
  const [p50, p99] = presses.at(0.5, 0.99);
  set("press-p50", known(p50, (value) => `${value.toFixed(0)} ms`));
  set("press-p99", known(p99, (value) => `${value.toFixed(0)} ms`));
  set("press-count", presses.count.toLocaleString("en"));
  set("missed", frame.missed.toLocaleString("en"));
  set("chain", `${frame.chain.slice(0, 8)}…${frame.chain.slice(-8)}`);
  ledger.draw();
}

// Numbers and charts take turns, each about five times a second, so that no refresh has to do all of it.
const TURNS = [
  (frame) => {
    showNumbers(frame);
    if (currentState() !== shownState) refresh();
  },
  () => ledger.drawFrames(status?.fps ? 1000 / status.fps : 0),
  () => drift.draw(),
];

function paint(now) {
  requestAnimationFrame(paint);
  const frame = waiting.shift();
  if (!frame) return;
  const first = !painted;
  painted = frame;
  stage.show(frame, { difference: $("diff-on").checked, pointer: input.pointer });
  const time = performance.now();
  let latency = NaN;
  if (sentTimes.has(frame.inputTime)) { // other pages have other clocks
    for (const sent of sentTimes) { // in the order sent: what came before has acted too
      sentTimes.delete(sent);
      if (sent === frame.inputTime) break;
    }
    latency = time - frame.inputTime;
    presses.add(latency);
  }
  paints.push(time);
  while (paints[0] < time - 1000) paints.shift();
  document.dispatchEvent(new CustomEvent("worldline:paint", { detail: { id: frame.id, time, latency } }));
  if (first) refresh();
  if (now - charted > 60) {
    charted = now;
    TURNS[turn++ % TURNS.length](frame);
  }
}

// ---- controls to server

const reset = () => {
  const seed = Number($("seed").value);
  if (!Number.isInteger(seed) || seed < 0 || seed > 2147483647) return note("The seed is a whole number from 0 to 2147483647.");
  differs = null;
  drift.clear();
  socket.send({ t: "reset", seed });
};
const toggleRecording = () => {
  if ($("record").disabled) return;
  socket.send({ t: "record", on: !status?.recording });
};
const anchor = () => {
  if (!$("anchor").disabled) socket.send({ t: "anchor" });
};
const help = () => ($("help").open ? $("help").close() : $("help").showModal());

const act = (edge) => {
  if (!status?.player) return;
  if (edge.time) sentTimes.add(edge.time);
  socket.send(edge);
};
const input = new Input($("imagined"), act, {
  r: reset,
  x: anchor,
  o: toggleRecording,
  "?": help,
});

$("reset-form").addEventListener("submit", (event) => {
  event.preventDefault();
  reset();
  $("imagined").focus({ preventScroll: true });
});
$("record").onclick = toggleRecording;
$("anchor").onclick = anchor;
$("open").onclick = () => socket.send(status?.state === "replaying" ? { t: "live" } : { t: "list" });
$("verify").onclick = () => socket.send({ t: "verify", name: "" });
$("pace").onchange = ({ target }) => {
  socket.send({ t: "pace", fps: Number(target.value) });
  target.blur();
};
$("truth-on").onchange = ({ target }) => socket.send({ t: "truth", on: target.checked });
$("diff-on").onchange = refresh;
$("help-open").onclick = help;
$("retry").onclick = () => socket.connect();
document.addEventListener("visibilitychange", tellVisible);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  stage.theme();
  ledger.theme();
});

refresh();
requestAnimationFrame(paint);
