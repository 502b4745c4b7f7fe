// One conversation: its tree, and the answer that is being written. It draws nothing; `changed` is told of what happens.
import { ApiError, get, path, post, remove, request, stream } from "./api.js";
import { Tree } from "./tree.js";

const others = new BroadcastChannel("heronry"); // the other tabs
export const onOtherTab = (listen) => others.addEventListener("message", (event) => listen(event.data));

const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const titleOf = (text) => text.trim().split("\n")[0].slice(0, 60) || "New conversation";

export class Conversation {
  // about: as the server has it, with its messages; nothing for a new one, which has no id before its first message.
  constructor(about = { title: "New conversation", settings: {} }) {
    this.changed = () => {}; // "tree", "text", "state", "list"
    this.controller = null; // of the answer that is being written
    this.writing = null; // its message
    this.failed = null; // {message, body}: what was asked for, in words that can be said again
    this.settled = Promise.resolve(); // after a stop: once the server has stored what was written
    this.#take(about);
    this.leaf = this.tree.get(about.leaf) ? about.leaf : this.tree.leaf(null);
  }

  static open = async (id) => new Conversation(await get(path("conversations", id)));

  get id() {
    return this.about.id;
  }

  get messages() {
    return this.tree.path(this.leaf);
  }

  #take({ messages = [], ...about }) {
    const chosen = this.tree?.chosen;
    this.about = about;
    this.tree = new Tree(messages);
    if (chosen) this.tree.chosen = chosen;
  }

  // What the server has now: another tab may have changed it. The branch that is shown stays.
  async refresh() {
    this.stale = Boolean(this.controller); // then it waits for the end of the answer
    if (!this.id || this.stale) return;
    const asked = this.asked = Symbol();
    const about = await get(path("conversations", this.id));
    if (asked !== this.asked) return; // a later one knows more
    this.stale = Boolean(this.controller);
    if (this.stale) return;
    this.failed = null;
    this.#take(about);
    this.leaf = this.tree.leaf(this.tree.get(this.leaf) ? this.leaf : (this.tree.get(about.leaf) ? about.leaf : null));
    this.changed("tree");
  }

  #tell() {
    this.changed("list");
    others.postMessage(this.id);
  }

  async #create(title) {
    if (this.id) return;
    const { settings } = this.about;
    this.about = await post(path("conversations"), { title, settings });
    this.changed("list");
  }

  async change(fields) {
    if (this.id) this.about = await post(path("conversations", this.id), fields);
    else this.about = { ...this.about, ...fields, settings: { ...this.about.settings, ...fields.settings } };
    if (this.id) this.#tell();
  }

  // Shows the branch through a message.
  async choose(id) {
    this.leaf = id === null ? null : this.tree.leaf(id);
    this.changed("tree");
    await post(path("conversations", this.id), { leaf: this.leaf });
  }

  // A message by hand.
  async write(parent, role, content) {
    const message = await post(path("conversations", this.id, "messages"), { parent, role, content });
    this.tree.put(message);
    await this.choose(message.id);
    this.#tell();
  }

  async remove(id) {
    await remove(path("conversations", this.id, "messages", id));
    await this.choose(this.tree.remove(id));
    this.#tell();
  }

  // Asks for an answer, in the words of the server, and reads it to its end.
  async answer(body, picture) {
    if (this.controller) return;
    this.controller = new AbortController();
    this.failed = null;
    await this.settled;
    this.changed("tree");
    let again = body;
    try {
      await this.#create(titleOf(body.content ?? ""));
      const events = stream(path("conversations", this.id, "answers"), { ...body, picture }, this.controller.signal);
      let ended = false;
      for await (const event of events) {
        const { type, message, text } = event;
        if (type === "user") {
          again = { parent: message.id };
          this.#put(message);
        } else if (type === "begin") {
          this.#put(this.writing = message);
        } else if (type === "content" || type === "reasoning") {
          this.writing[type] += text;
          this.changed("text", { [type]: text });
        } else if (type === "state") {
          this.changed("state", event);
        } else if (type === "end") {
          ended = true;
          this.writing = null;
          this.#put(message);
          this.changed("said", message);
        } else if (event.error) {
          throw new ApiError(0, event.error.message);
        }
      }
      if (!ended) throw new ApiError(0, "the connection to the server was lost");
    } catch (error) {
      if (error.name === "AbortError") this.settled = this.#settle(this.writing);
      else this.failed = { message: error.message, body: again };
    }
    this.writing = null;
    this.controller = null;
    this.changed("tree");
    await this.settled;
    this.#tell();
    if (this.stale) await this.refresh();
  }

  #put(message) {
    this.tree.put(message);
    this.leaf = message.id;
    this.changed("tree");
  }

  // After a stop the server stores what was written; until then what was shown stands.
  async #settle(writing) {
    if (writing) this.tree.put({ ...writing, finish_reason: "cancelled" });
    for (const pause of [50, 100, 200, 400, 800, 1600]) {
      await wait(pause);
      const { messages } = await get(path("conversations", this.id)).catch(() => ({ messages: [] }));
      if (writing?.content && !messages.some((x) => x.id === writing.id && x.finish_reason)) continue;
      for (const message of messages) this.tree.put(message);
      if (writing && !messages.some((x) => x.id === writing.id)) this.leaf = this.tree.remove(writing.id);
      this.leaf = this.tree.leaf(this.leaf);
      break;
    }
    this.changed("tree");
  }

  stop() {
    this.controller?.abort();
  }

  async export() {
    return (await request(path("conversations", this.id, "export"))).blob();
  }
}
