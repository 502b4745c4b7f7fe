// The server: calls, streams, and the key. The key lives as long as the tab.
let askKey = async () => null;
export const onKeyNeeded = (ask) => { askKey = ask; };

// A reply that is no success, in one line.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function errorOf(reply) {
  const body = await reply.json().catch(() => null);
  return new ApiError(reply.status, body?.error?.message ?? `the server answered ${reply.status}`);
}

// A fetch that asks for the key where one is needed. Throws an ApiError, or an AbortError.
export async function request(path, { method = "GET", json, body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  if (json !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method, headers, signal, body: json === undefined ? body : JSON.stringify(json) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "the server cannot be reached");
  }
  if (reply.ok) return reply;
  const error = await errorOf(reply);
  if (reply.status !== 401) throw error;
  if (sessionStorage.getItem("key") === key) { // else another call has asked for it meanwhile
    const given = await askKey(key ? error.message : "This server asks for a key");
    if (!given) throw error;
    sessionStorage.setItem("key", given);
  }
  return request(path, { method, json, body, signal });
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, json) => (await request(path, { method: "POST", json })).json();
export const remove = async (path) => (await request(path, { method: "DELETE" })).json();

// The server-sent events of a reply, each as its data.
export async function* stream(path, json, signal) {
  const reply = await request(path, { method: "POST", json, signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError(0, "the connection to the server was lost");
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const path = (...parts) => "/v1/" + parts.map(encodeURIComponent).join("/");

// Gives the reader a file to save.
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
