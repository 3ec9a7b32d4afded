// The page: one session, its room, its events, and the conversation.

import { ask, events, Gone, picture, Refused, setToken } from "./api.js";
import { Call, FrameCounter, loadLibrary, Meter } from "./call.js";
import { GoLive } from "./golive.js";
import { Microphone } from "./mic.js";

const $ = (id) => document.getElementById(id);
const LONGEST_LIST = 200;
const WORDS_SHOWN = 14;

// --- what is going on --------------------------------------------------------------------------------

const LABELS = {
  connecting: "Connecting",
  loading: "Loading",
  waking: "Waiting for the picture",
  ready: "Ready",
  preparing: "Preparing",
  speaking: "Speaking",
  reconnecting: "Reconnecting",
  full: "All places taken",
  gone: "Server out of reach",
  locked: "Token needed",
  failed: "Can't go on",
};

let trouble = "connecting"; // what stands in the way, or null
let stage = "idle"; // the avatar's own state
const broadcast = new GoLive(document.getElementById("golive"));
let session = null; // the ticket of the session that is open
let switching = null; // AbortController of the session's life
let personas = [];
let wake = null; // ends the present waiting before its time

function show() {
  let state = trouble ?? (call.present ? { idle: "ready", processing: "preparing" }[stage] ?? "speaking" : "waking");
  if (state === "speaking" && stage === "transitioning") state = "ready";
  document.body.dataset.state = state;
  const badge = document.querySelector("[data-testid=state]");
  if (badge.dataset.state !== state) {
    badge.dataset.state = state;
    $("state-text").textContent = LABELS[state];
  }
  const usable = session !== null && !["gone", "locked", "full", "failed"].includes(state);
  $("say").disabled = !usable;
  $("mic").disabled = !usable;
  $("file").disabled = !usable;
  $("file-label").classList.toggle("off", !usable);
  $("stop").disabled = !usable || !(busy() || stage === "talking" || stage === "processing");
}

function setTrouble(what) {
  trouble = what;
  show();
}

/** Lay a message over the picture; no title takes it away. */
function notice(title, text = "", { retry = false, unlock = false, left = null } = {}) {
  $("notice").hidden = !title;
  if (!title) return;
  $("notice-count").textContent = left === null ? "" : `Trying again in ${left} s`;
  if ($("notice-title").textContent !== title) $("notice-title").textContent = title;
  if ($("notice-text").textContent !== text) $("notice-text").textContent = text;
  $("retry").hidden = !retry;
  $("unlock").hidden = !unlock;
}

/** Wait, telling how long; "Try now", or the network coming back, ends it. */
async function pause(seconds, tell, signal) {
  const end = performance.now() + seconds * 1000;
  let woken = false;
  wake = () => (woken = true);
  while (!woken && !signal?.aborted && performance.now() < end) {
    tell?.(Math.max(1, Math.ceil((end - performance.now()) / 1000)));
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  wake = null;
}

function backOff(attempt) {
  return Math.min(10, 0.75 * 2 ** attempt) * (0.8 + 0.4 * Math.random());
}

// --- the life of a session ---------------------------------------------------------------------------

async function live() {
  for (;;) {
    session = await enter();
    remember(session);
    broadcast.show(session.id);
    switching = new AbortController();
    const { signal } = switching;
    setTrouble(call.present ? null : "connecting");
    const room = keepRoom(signal);
    await keepEvents(signal);
    switching.abort();
    await room;
    session = null;
    broadcast.show(null);
    stage = "idle";
    microphone.stop();
    showMicrophone();
    settleAll();
    setTrouble("connecting");
  }
}

/** A session: the one this tab had, or a new one. Tries until there is one. */
async function enter() {
  for (let attempt = 0; ; attempt++) {
    try {
      personas = await ask("GET", "/personas");
      fillPersonas();
      const ticket = (await resume()) ?? (await open());
      notice(null);
      return ticket;
    } catch (error) {
      await explain(error, attempt);
    }
  }
}

async function resume() {
  const kept = JSON.parse(sessionStorage.getItem("session") ?? "null");
  if (!kept) return null;
  try {
    const ticket = await ask("POST", `/sessions/${kept.id}/ticket`);
    return { ...kept, ...ticket, fresh: false };
  } catch (error) {
    if (error instanceof Refused && [404, 409].includes(error.status)) {
      sessionStorage.removeItem("session");
      return null;
    }
    throw error;
  }
}

async function open() {
  const name = $("persona").value;
  const persona = personas.find((one) => one.name === name) ?? personas[0];
  if (!persona) throw new Refused(404, "the server has no persona: see `voipavatar personas`");
  const json = { persona: persona.name, voice: $("voice").value || null };
  const opened = await ask("POST", "/sessions", { json, timeout: 120_000 });
  return { ...opened, persona: opened.persona.name, fresh: true };
}

function remember({ id, persona, voice }) {
  sessionStorage.setItem("session", JSON.stringify({ id, persona, voice }));
  $("persona").value = persona;
  fillVoices(voice);
}

/** Say what is in the way and wait until it may be gone. */
async function explain(error, attempt) {
  if (error instanceof Refused && error.status === 401) {
    setTrouble("locked");
    notice("This server asks for a token", "It was chosen by whoever started it (VOIPAVATAR_TOKEN).", {
      unlock: true,
    });
    $("token").focus();
    await pause(1e9);
  } else if (error instanceof Refused && error.status === 503) {
    setTrouble("full");
    await pause(error.after ?? backOff(attempt), (left) =>
      notice("Not just now", sentence(error.message), { retry: true, left })
    );
  } else if (error instanceof Refused) {
    setTrouble("failed");
    notice("That didn't work", sentence(error.message), { retry: true });
    await pause(1e9);
  } else {
    await gone(attempt);
  }
}

async function gone(attempt, signal) {
  setTrouble("gone");
  await pause(
    backOff(attempt),
    (left) => notice("The server is out of reach", "This page comes back by itself.", { retry: true, left }),
    signal
  );
}

/** Follow the events through breaks of the wire; returns when the session is over. */
async function keepEvents(signal) {
  for (let attempt = 0; !signal.aborted; ) {
    try {
      await events(
        session.id,
        signal,
        () => {
          if (attempt > 0) resync();
          attempt = 0;
          if (trouble === "gone") setTrouble(call.present ? null : "connecting");
          notice(null);
        },
        heard
      );
      sessionStorage.removeItem("session");
      return; // closed: a new one is opened
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status === 404) {
        sessionStorage.removeItem("session");
        return;
      }
      if (!(error instanceof Gone) && !(error instanceof Refused)) throw error;
      await gone(attempt++, signal);
    }
  }
}

/** LiveKit's client; the first time on this machine the server has to fetch it, which is told. */
async function library(signal) {
  if (window.LivekitClient) return;
  if (trouble === "connecting") setTrouble("loading");
  const slow = setTimeout(() => {
    if (trouble === "loading" && !signal.aborted) {
      notice("Fetching LiveKit's browser library", "Only this once: it is kept on the server afterwards.");
    }
  }, 2_000);
  try {
    await loadLibrary();
    if (trouble === "loading") notice(null);
  } finally {
    clearTimeout(slow);
  }
}

/** Be in the room until the session is over, coming back when it breaks. */
async function keepRoom(signal) {
  let ticket = session;
  for (let attempt = 0; !signal.aborted; attempt++) {
    try {
      await library(signal);
      const began = performance.now();
      if (attempt > 0) ticket = await ask("POST", `/sessions/${ticket.id}/ticket`);
      if (await call.attend(ticket, signal)) return;
      if (performance.now() - began > 10_000) attempt = 0;
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status === 404) return;
      if (!(error instanceof Gone) && trouble !== "gone") {
        notice("No picture yet", sentence(error.message), { retry: true });
      }
    }
    if (trouble !== "gone") setTrouble("reconnecting");
    await pause(backOff(Math.min(attempt, 3)), null, signal);
  }
}

async function switchPersona() {
  const old = session;
  if (!old || $("persona").value === old.persona) return;
  sessionStorage.removeItem("session");
  fillVoices(null);
  poster();
  setTrouble("connecting");
  switching?.abort();
  await ask("DELETE", `/sessions/${old.id}`).catch(() => {});
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

// --- the room ----------------------------------------------------------------------------------------

const video = $("video");
const call = new Call(video, {
  state(state) {
    if (state === "reconnecting") setTrouble("reconnecting");
    else if (trouble !== "gone") setTrouble(null);
    if (state === "connected") notice(null);
  },
  sound(allowed) {
    $("start").hidden = allowed;
    if (allowed) greet();
  },
  speaker() {
    video.classList.remove("live");
    poster();
    show();
  },
});
const frames = new FrameCounter(video);
const meter = new Meter();

function pictureIsLive() {
  if (video.videoWidth === 0) return;
  video.classList.add("live");
  $("screen").style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`;
  if (["connecting", "loading", "reconnecting"].includes(trouble)) trouble = null;
  show();
}
video.addEventListener("playing", pictureIsLive);
video.addEventListener("resize", pictureIsLive);

async function poster() {
  const persona = personas.find((one) => one.name === $("persona").value);
  const image = $("poster");
  if (!persona || image.dataset.of === persona.name) return;
  image.dataset.of = persona.name;
  $("who").textContent = persona.title;
  $("about").textContent = persona.description;
  document.title = `${persona.title} · voipavatar`;
  $("screen").style.aspectRatio = `${persona.width} / ${persona.height}`;
  const source = persona.portrait ? await picture(persona.portrait) : null;
  if (image.dataset.of !== persona.name) return;
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = source === null;
  if (source) image.src = source;
}

async function measure() {
  const stats = await meter.read(call.tracks).catch(() => null);
  const fps = frames.read() ?? (document.hidden ? stats?.fps : null);
  put("fps", fps, (value) => `${value.toFixed(1).replace(/\.0$/, "")} fps`);
  put("rtt", stats?.rtt, (value) => `${Math.round(value)} ms`);
  put("jitter", stats?.jitter, (value) => `${value.toFixed(value < 10 ? 1 : 0)} ms`);
  put("bitrate", stats?.bitrate, (value) =>
    value < 1e6 ? `${Math.round(value / 1e3)} kb/s` : `${(value / 1e6).toFixed(1)} Mb/s`
  );
}

function put(id, value, form) {
  $(id).textContent = value === null || value === undefined ? "–" : form(value);
}

let greeted = null;
async function greet() {
  const persona = personas.find((one) => one.name === session?.persona);
  if (!session?.fresh || greeted === session.id || !persona?.greeting) return;
  greeted = session.id;
  await say(persona.greeting);
}

// --- what was said -----------------------------------------------------------------------------------

const STATUS = {
  sending: "sending",
  queued: "queued",
  speaking: "speaking",
  said: "said",
  interrupted: "interrupted",
  failed: "failed",
};
const lines = new Map(); // utterance → its line
const sending = new Set(); // requests under way: their utterances aren't known yet

/** A line of the conversation; `spoken` is the text that is said, which a sound doesn't have. */
function line(text, status, spoken = text) {
  const item = document.createElement("li");
  const words = document.createElement("p");
  const chip = document.createElement("span");
  words.textContent = text;
  chip.className = "chip";
  item.append(words, chip);
  const one = { item, chip, spoken, status: "", asked: null };
  $("history").append(item);
  while ($("history").children.length > LONGEST_LIST) $("history").firstChild.remove();
  $("empty").hidden = true;
  mark(one, status);
  $("past").scrollTop = $("past").scrollHeight;
  return one;
}

function mark(one, status, why = "") {
  one.status = status;
  one.item.dataset.status = status;
  one.chip.textContent = STATUS[status];
  one.item.title = why;
  show();
}

function busy() {
  return [...lines.values()].some((one) => one.status === "queued" || one.status === "speaking");
}

function settleAll() {
  for (const one of lines.values()) {
    if (one.status === "queued" || one.status === "speaking") mark(one, "interrupted");
  }
  lines.clear();
  clearCaptions();
}

async function say(text) {
  const json = { text, mode: $("mode").value, voice: $("voice").value || null };
  await request(line(text, "sending"), { json });
}

async function play(file) {
  if (!file) return;
  const type = file.type.startsWith("audio/") || file.type.startsWith("video/") ? file.type : "application/octet-stream";
  await request(line(`♪ ${file.name}`, "sending", ""), { body: file, type, timeout: 120_000 });
}

async function request(one, what) {
  problem(null);
  const waits = $("mode").value === "append" && busy();
  const query = what.json ? "" : `?mode=${$("mode").value}`;
  one.asked = waits ? null : performance.now();
  const asking = ask("POST", `/sessions/${session.id}/say${query}`, what);
  sending.add(asking);
  try {
    const { utterance, state } = await asking;
    lines.set(utterance, one);
    mark(one, state);
  } catch (error) {
    mark(one, "failed", error.message);
    if (error instanceof Refused && error.status !== 401) problem(sentence(error.message));
    else problem("The server is out of reach: that line was not said.");
  } finally {
    sending.delete(asking);
  }
}

/** After a break: what the page missed it can't know, the server does. */
async function resync() {
  const now = await ask("GET", `/sessions/${session.id}`).catch(() => null);
  if (now && now.pending === 0) settleMissed();
}

function settleMissed() {
  for (const one of lines.values()) {
    if (one.status === "queued" || one.status === "speaking") mark(one, "said");
  }
}

function problem(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text ?? "";
}

async function stop() {
  if (!session) return;
  clearCaptions();
  if (microphone.on) {
    microphone.stop();
    showMicrophone();
  }
  await ask("POST", `/sessions/${session.id}/interrupt`).catch((error) => {
    if (error instanceof Refused) problem(sentence(error.message));
  });
}

// --- events ------------------------------------------------------------------------------------------

/** One event. Those of utterances wait for the answers under way, which name them. */
function heard(event) {
  const at = performance.now();
  broadcast.heard(event);
  if (event.type === "state") {
    stage = event.state;
    show();
  } else if (event.type === "error" && !event.utterance) {
    problem(sentence(event.error));
  } else if (event.utterance) {
    if (sending.size === 0) spoken(event, at);
    else Promise.allSettled([...sending]).then(() => spoken(event, at));
  }
}

function spoken(event, at) {
  let one = lines.get(event.utterance);
  if (!one && event.type === "started") {
    one = line(event.text || "Live sound", "speaking", event.text ?? ""); // somebody else's
    lines.set(event.utterance, one);
  }
  if (!one) return;
  const delay = meter.delay * 1000; // the sound still waits that long in this browser
  if (event.type === "started") {
    mark(one, "speaking");
    if (one.asked !== null) put("latency", at - one.asked + delay, (value) => `${Math.round(value)} ms`);
    setTimeout(() => openCaptions(event.utterance, one.spoken), delay);
  } else if (event.type === "caption") {
    setTimeout(() => caption(event.utterance, event.text), delay);
  } else if (event.type === "error") {
    one.item.title = event.error;
    problem(sentence(event.error));
  } else if (event.type === "finished") {
    const failed = event.error && event.heard === 0;
    mark(one, failed ? "failed" : event.interrupted ? "interrupted" : "said", event.error ?? "");
    if (event.interrupted && event.heard === 0) one.chip.textContent = "not said";
    lines.delete(event.utterance);
    setTimeout(() => closeCaptions(event.utterance), event.interrupted ? 0 : delay + 900);
  }
}

// --- captions ----------------------------------------------------------------------------------------

let captioned = null; // the utterance whose words are shown
let worded = false; // its voice tells words

function openCaptions(utterance, text) {
  captioned = utterance;
  worded = false;
  $("captions").replaceChildren();
  setTimeout(() => {
    // A voice without word times: the text as a whole is better than nothing.
    if (captioned === utterance && !worded) $("captions").textContent = clipped(text);
  }, 700);
}

function caption(utterance, text) {
  if (captioned !== utterance) return;
  const box = $("captions");
  if (!worded || box.children.length >= WORDS_SHOWN) box.replaceChildren();
  worded = true;
  box.querySelector(".now")?.classList.remove("now");
  const word = document.createElement("span");
  word.className = "now";
  word.textContent = text;
  if (box.children.length) box.append(" ");
  box.append(word);
}

function clipped(text) {
  return text.length <= 160 ? text : `${text.slice(0, 157).replace(/\s+\S*$/, "")}…`;
}

function closeCaptions(utterance) {
  if (captioned === utterance) clearCaptions();
}

function clearCaptions() {
  captioned = null;
  $("captions").replaceChildren();
}

// --- choices -----------------------------------------------------------------------------------------

function fillPersonas() {
  const select = $("persona");
  const wish = new URL(location.href).searchParams.get("persona");
  const chosen = select.dataset.filled ? select.value : wish ?? kept()?.persona;
  select.replaceChildren(...personas.map((one) => new Option(one.title, one.name)));
  if (personas.some((one) => one.name === chosen)) select.value = chosen;
  select.dataset.filled = "yes";
  select.disabled = personas.length < 2;
  fillVoices($("voice").value || kept()?.voice);
  poster();
}

function kept() {
  return JSON.parse(sessionStorage.getItem("session") ?? "null");
}

function fillVoices(chosen) {
  const persona = personas.find((one) => one.name === $("persona").value);
  const select = $("voice");
  const voices = persona?.voices ?? [];
  select.replaceChildren(...voices.map((one) => new Option(one.label, one.name)));
  if (voices.some((one) => one.name === chosen)) select.value = chosen;
  select.disabled = voices.length < 2;
}

// --- microphone --------------------------------------------------------------------------------------

const microphone = new Microphone((why) => {
  showMicrophone();
  if (why) problem(sentence(why));
});

function showMicrophone() {
  $("mic").setAttribute("aria-pressed", String(microphone.on));
  $("mic").setAttribute("aria-label", microphone.on ? "Stop the microphone" : "Talk through the avatar");
}

async function toggleMicrophone() {
  problem(null);
  if (microphone.on) microphone.stop();
  else await microphone.start(session.id).catch((error) => problem(sentence(error.message)));
  showMicrophone();
}

// --- hands -------------------------------------------------------------------------------------------

function submit() {
  const text = $("text").value.trim();
  if (!text || $("say").disabled) return;
  $("text").value = "";
  call.allowSound();
  say(text);
}

$("say-form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
  $("text").focus();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !$("stop").disabled) {
    event.preventDefault();
    stop();
  }
});
$("stop").addEventListener("click", () => {
  stop();
  $("text").focus();
});
$("start").addEventListener("click", async () => {
  await call.allowSound();
  $("text").focus();
});
$("mic").addEventListener("click", () => {
  call.allowSound();
  toggleMicrophone();
});
$("file").addEventListener("change", () => {
  call.allowSound();
  play($("file").files[0]);
  $("file").value = "";
});
$("screen").addEventListener("dragover", (event) => event.preventDefault());
$("screen").addEventListener("drop", (event) => {
  event.preventDefault();
  if (!$("say").disabled) play(event.dataTransfer.files[0]);
});
$("persona").addEventListener("change", switchPersona);
$("retry").addEventListener("click", () => wake?.());
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken($("token").value.trim());
  $("token").value = "";
  wake?.();
});
window.addEventListener("online", () => wake?.());

setInterval(measure, 1000);
live();
