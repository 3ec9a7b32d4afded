// The server, as the page talks to it.

const SILENCE = 25_000; // ms without a sign of life on the event stream (the server beats at 10 s)

/** The server can't be reached, or answers nonsense: it may come back. */
export class Gone extends Error {}

/** The server answered that it won't; `status` and its sentence say why. */
export class Refused extends Error {
  constructor(status, message, after) {
    super(message);
    this.status = status;
    this.after = after; // seconds, where the server said when to come again
  }
}

let token = takeToken();

function takeToken() {
  const address = new URL(location.href);
  const given = address.searchParams.get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    address.searchParams.delete("token"); // not for the history, nor for a shoulder
    history.replaceState(null, "", address);
  }
  return sessionStorage.getItem("token") ?? "";
}

export function setToken(given) {
  token = given;
  sessionStorage.setItem("token", given);
}

function headers(more = {}) {
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

/** Ask; the answer's JSON, or null when it has none. Raises Gone or Refused. */
export async function ask(method, path, { json, body, type, timeout = 20_000, keepalive } = {}) {
  const options = { method, headers: headers(), signal: AbortSignal.timeout(timeout), keepalive };
  if (json !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(json);
  } else if (body !== undefined) {
    options.headers["content-type"] = type;
    options.body = body;
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw new Gone(error.message);
  }
  return await read(answer);
}

async function read(answer) {
  if (answer.ok) return answer.status === 204 ? null : await answer.json();
  throw await refusal(answer);
}

async function refusal(answer) {
  let sentence = null;
  try {
    sentence = (await answer.json()).error;
  } catch {
    // not ours: a proxy, perhaps
  }
  if (sentence === null || sentence === undefined) return new Gone(`status ${answer.status}`);
  const after = Number(answer.headers.get("retry-after")) || null;
  return new Refused(answer.status, sentence, after);
}

/** A picture as an object URL: an <img> can't send the token. */
export async function picture(path) {
  try {
    const answer = await fetch(path, { headers: headers() });
    return answer.ok ? URL.createObjectURL(await answer.blob()) : null;
  } catch {
    return null;
  }
}

/**
 * Follow a session's events until it closes. `onOpen` once the stream flows, `onEvent(event)` for each.
 * Resolves when the session is closed; raises Gone when the wire broke, Refused when there is no such session.
 */
export async function events(id, signal, onOpen, onEvent) {
  const wire = new AbortController();
  const stop = () => wire.abort();
  signal.addEventListener("abort", stop);
  let timer = setTimeout(stop, SILENCE);
  try {
    const answer = await fetch(`/sessions/${id}/events`, {
      headers: headers({ accept: "text/event-stream" }),
      signal: wire.signal,
    });
    if (!answer.ok) throw await refusal(answer);
    onOpen();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      clearTimeout(timer);
      timer = setTimeout(stop, SILENCE);
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").find((line) => line.startsWith("data: "));
        if (!data) continue;
        const event = JSON.parse(data.slice(6));
        onEvent(event);
        if (event.type === "closed") return;
      }
    }
  } catch (error) {
    if (error instanceof Refused || signal.aborted) throw error;
    throw new Gone(error.message);
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
    wire.abort();
  }
  throw new Gone("the event stream ended");
}

/** Address of a WebSocket of this server. */
export function socketAddress(path, query) {
  const address = new URL(path, location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  for (const [name, value] of Object.entries(query)) address.searchParams.set(name, value);
  if (token) address.searchParams.set("token", token);
  return address.href;
}
