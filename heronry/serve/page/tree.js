// A conversation as a tree of messages, and which branch of it is shown. Nothing here knows the page or the server.
export class Tree {
  constructor(messages = []) {
    this.messages = new Map();
    this.children = new Map([[null, []]]); // id -> ids of the answers to it, oldest first
    this.chosen = new Map(); // id -> the child that was shown last
    for (const message of messages) this.put(message);
  }

  get(id) {
    return this.messages.get(id);
  }

  // Adds a message, or takes its newer form.
  put(message) {
    if (!this.messages.has(message.id)) {
      if (!this.children.has(message.parent)) this.children.set(message.parent, []);
      this.children.get(message.parent).push(message.id);
    }
    this.messages.set(message.id, message);
  }

  below(id) {
    return this.children.get(id) ?? [];
  }

  // The messages of a branch, from the first one to its leaf; remembers it.
  path(leaf) {
    const found = [];
    const seen = new Set();
    for (let id = leaf; this.messages.has(id) && !seen.has(id); id = this.messages.get(id).parent) {
      seen.add(id);
      found.push(this.messages.get(id));
      this.chosen.set(this.messages.get(id).parent, id);
    }
    return found.reverse();
  }

  // The end of the branch through a message: the one shown last, else the newest. null: of the whole conversation.
  leaf(id) {
    let found = id;
    const seen = new Set();
    while (this.below(found).length && !seen.has(found)) {
      seen.add(found);
      const ids = this.below(found);
      found = ids.includes(this.chosen.get(found)) ? this.chosen.get(found) : ids.at(-1);
    }
    return found;
  }

  siblings(id) {
    return this.below(this.messages.get(id)?.parent ?? null);
  }

  // A message and all below it.
  branch(id) {
    const found = [id];
    for (let i = 0; i < found.length; i++) found.push(...this.below(found[i]));
    return found;
  }

  // Removes a branch; returns the leaf that is shown in its place.
  remove(id) {
    const { parent } = this.messages.get(id);
    const ids = this.siblings(id);
    const i = ids.indexOf(id);
    const beside = ids[i + 1] ?? ids[i - 1];
    for (const gone of this.branch(id)) {
      this.messages.delete(gone);
      this.children.delete(gone);
    }
    ids.splice(i, 1);
    return beside === undefined ? parent : this.leaf(beside);
  }
}
