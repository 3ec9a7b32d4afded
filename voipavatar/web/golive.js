// "Go live": broadcast the session that the page shows, and see how each address fares.
//
//   import { GoLive } from "./golive.js";
//   const panel = new GoLive(document.getElementById("golive"));
//   panel.show(session?.id ?? null);      // whenever the page's session changes
//   panel.heard(event);                   // every event of the session
//
// Addresses hold keys: they are sent once, never kept, and never come back.

import { ask, Gone, Refused } from "./api.js";

const LABELS = {
  connecting: "Connecting",
  live: "Live",
  stalled: "Stalled",
  reconnecting: "Coming back",
  failed: "Failed",
  ended: "Ended",
};

const PANEL = `
  <details class="golive-box">
    <summary><span class="golive-lamp" aria-hidden="true"></span><span>Go live</span>
      <span class="golive-sum" role="status" aria-live="polite"></span></summary>
    <form class="golive-form" autocomplete="off">
      <label class="golive-wide"><span>Stream address</span>
        <input name="url" type="password" required spellcheck="false" autocomplete="new-password"
               placeholder="rtmps://…/app/key" aria-describedby="golive-problem"></label>
      <label><span>For</span><select name="preset">
        <option value="youtube">YouTube</option><option value="twitch">Twitch</option>
        <option value="low-latency">Low latency</option></select></label>
      <label><span>Shape</span><select name="shape">
        <option value="">As it is</option><option>16:9</option><option>9:16</option>
        <option>1:1</option></select></label>
      <label><span>By</span><select name="via">
        <option value="direct">This server</option><option value="egress">LiveKit egress</option>
      </select></label>
      <label class="golive-check"><input type="checkbox" name="captions"> <span>Captions</span></label>
      <button type="submit" class="primary">Go live</button>
    </form>
    <p class="golive-problem" id="golive-problem" role="alert" hidden></p>
    <ul class="golive-list" data-testid="outputs"></ul>
  </details>`;

export class GoLive {
  #root;
  #id = null;
  #outputs = new Map();
  #timer = null;

  constructor(root) {
    this.#root = root;
    root.innerHTML = PANEL;
    root.classList.add("golive");
    this.#form.addEventListener("submit", (event) => this.#start(event));
    this.show(null);
  }

  get #form() {
    return this.#root.querySelector("form");
  }

  /** The session that is broadcast from now on; null when there is none. */
  show(id) {
    this.#id = id;
    this.#outputs.clear();
    this.#form.querySelector("button").disabled = id === null;
    this.#problem("");
    this.#draw();
    clearInterval(this.#timer);
    if (id !== null) {
      this.#refresh();
      this.#timer = setInterval(() => this.#outputs.size && this.#refresh(), 5_000);
    }
  }

  /** An event of the session; those of outputs are taken in. */
  heard(event) {
    if (event.type !== "output" || !event.id) return;
    this.#take(event);
    this.#draw();
  }

  #take(one) {
    if (one.state === "ended") this.#outputs.delete(one.id);
    else this.#outputs.set(one.id, { ...this.#outputs.get(one.id), ...one });
  }

  async #refresh() {
    const id = this.#id;
    try {
      const all = await ask("GET", `/sessions/${id}/outputs`);
      if (id !== this.#id) return;
      this.#outputs = new Map(all.map((one) => [one.id, one]));
      this.#draw();
    } catch (error) {
      if (!(error instanceof Gone) && !(error instanceof Refused)) throw error;
    }
  }

  async #start(event) {
    event.preventDefault();
    const form = this.#form;
    const fields = new FormData(form);
    const json = {
      urls: [fields.get("url").trim()],
      preset: fields.get("preset"),
      shape: fields.get("shape") || null,
      via: fields.get("via"),
      captions: fields.get("captions") === "on",
    };
    const button = form.querySelector("button");
    button.disabled = true;
    this.#problem("");
    try {
      const added = await ask("POST", `/sessions/${this.#id}/outputs`, { json, timeout: 60_000 });
      form.elements.url.value = "";
      for (const one of added) this.#take(one);
      this.#draw();
    } catch (error) {
      this.#problem(error instanceof Refused ? error.message : "The server is out of reach.");
    } finally {
      button.disabled = this.#id === null;
    }
  }

  async #end(id) {
    try {
      await ask("DELETE", `/sessions/${this.#id}/outputs/${id}`, { timeout: 40_000 });
      this.#outputs.delete(id);
      this.#draw();
    } catch (error) {
      if (error instanceof Refused && error.status === 404) this.#outputs.delete(id);
      else this.#problem(error.message);
      this.#draw();
    }
  }

  #problem(text) {
    const place = this.#root.querySelector(".golive-problem");
    place.textContent = text && text.charAt(0).toUpperCase() + text.slice(1);
    place.hidden = !text;
  }

  #draw() {
    const all = [...this.#outputs.values()];
    const live = all.filter((one) => one.state === "live").length;
    const sum = this.#root.querySelector(".golive-sum");
    sum.textContent = all.length === 0 ? "" : `${live} of ${all.length} live`;
    const worst = all.some((one) => one.state === "failed") ? "failed"
      : all.some((one) => one.state !== "live") ? "waiting" : live ? "live" : "off";
    this.#root.dataset.state = all.length === 0 ? "off" : worst;
    this.#root.querySelector(".golive-list").replaceChildren(...all.map((one) => this.#row(one)));
  }

  #row(one) {
    const row = document.createElement("li");
    row.dataset.state = one.state;
    row.dataset.testid = "output";
    const text = (kind, words) => {
      const part = document.createElement("span");
      part.className = `golive-${kind}`;
      part.textContent = words;
      return part;
    };
    row.append(text("state", LABELS[one.state] ?? one.state), text("url", one.url));
    row.append(text("numbers", numbers(one)));
    if (one.reason && one.state !== "live") {
      row.append(text("reason", one.reason.replaceAll(one.url, "the server")));
    }
    const end = document.createElement("button");
    end.type = "button";
    end.textContent = one.state === "failed" ? "Remove" : "End";
    end.setAttribute("aria-label", `${end.textContent} ${one.url}`);
    end.addEventListener("click", () => {
      end.disabled = true;
      this.#end(one.id);
    });
    row.append(end);
    return row;
  }
}

function numbers(one) {
  if (one.state !== "live" && one.state !== "stalled") return "";
  const parts = [clock(one.uptime)];
  if (typeof one.bitrate === "number") parts.push(`${(one.bitrate / 1e6).toFixed(1)} Mb/s`);
  if (typeof one.fps === "number") parts.push(`${Math.round(one.fps)} fps`);
  if (one.dropped) parts.push(`${one.dropped} left out`);
  if (one.reconnects) parts.push(`back ${one.reconnects}×`);
  return parts.join(" · ");
}

function clock(seconds) {
  const whole = Math.floor(seconds ?? 0);
  const two = (number) => String(number).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}
