// The messages of the branch that is shown.
import { Growing, element, render } from "./markdown.js";

const bytes = (n) => (n < 1e6 ? `${Math.round(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`);
const ENDS = { length: "cut at the longest answer", cancelled: "stopped" };

export class Messages {
  // act: called with what a button says and its message.
  constructor(root, scroll, toEnd, act) {
    Object.assign(this, { root, scroll, toEnd, act, pending: { content: "", reasoning: "" }, frame: 0 });
    this.following = true;
    root.addEventListener("click", (event) => this.#click(event));
    scroll.addEventListener("scroll", () => {
      this.following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
      toEnd.hidden = this.following;
    }, { passive: true });
    toEnd.addEventListener("click", () => this.toBottom());
    new ResizeObserver(() => this.#follow()).observe(root);
  }

  toBottom() {
    this.following = true;
    this.#follow();
  }

  #follow() {
    if (this.following) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  // Draws a conversation; what is there already stays as it is.
  draw(conversation) {
    if (this.conversation !== conversation) this.root.replaceChildren();
    this.conversation = conversation;
    this.flush();
    const path = conversation.messages;
    const places = this.root.children;
    let same = 0;
    while (same < path.length && places[same]?.dataset.id === path[same].id) same++;
    while (places.length > same) places[same].remove();
    path.forEach((message, i) => this.#update(places[i] ?? this.#add(message), message, i === path.length - 1));
    this.root.classList.toggle("empty", !path.length);
    this.#follow();
  }

  #add(message) {
    const mine = message.role === "user";
    const article = element("article", {
      "data-id": message.id, class: message.role, "aria-label": mine ? "You" : "Answer", tabindex: "-1",
    });
    const thought = element("details", { class: "thought" }, element("summary", {}, "Thought"), element("div"));
    thought.hidden = true;
    article.append(...(mine ? [] : [thought]), element("div", { class: "content" }), element("footer"));
    this.root.append(article);
    return article;
  }

  #update(article, message, last) {
    const { tree, controller, writing } = this.conversation;
    const siblings = tree.siblings(message.id);
    const busy = Boolean(controller);
    const live = writing?.id === message.id;
    const now = [siblings.indexOf(message.id), siblings.length, last, busy, live, tree.below(message.id).length > 0];
    if (article.message === message && String(article.now) === String(now)) return;
    if (article.shown !== message.content || article.thought !== message.reasoning) this.#fill(article, message);
    article.classList.toggle("live", live);
    article.message = message;
    article.now = now;
    const focused = article.contains(document.activeElement) ? document.activeElement.dataset.act : null;
    article.querySelector("footer").replaceChildren(...this.#foot(message, ...now));
    if (focused) (article.querySelector(`[data-act="${focused}"]:enabled`) ?? article).focus();
  }

  #fill(article, message) {
    const content = article.querySelector(".content");
    content.replaceChildren();
    article.growing = null;
    if (message.role === "user") {
      content.textContent = message.content;
    } else {
      this.#think(article, message.reasoning, true);
      if (this.conversation.writing?.id === message.id) {
        article.growing = new Growing(content);
        article.growing.add(message.content);
      } else content.append(...render(message.content));
    }
    article.shown = message.content;
    article.thought = message.reasoning;
  }

  #think(article, text, anew) {
    const thought = article.querySelector(".thought");
    const place = thought.lastChild;
    if (anew) place.textContent = text;
    else place.append(text);
    thought.hidden = !place.firstChild;
  }

  #foot(message, i, n, last, busy, live, answered) {
    const button = (act, words, label) => {
      const found = element("button", { type: "button", "data-act": act, ...(label ? { "aria-label": label } : {}) }, words);
      found.disabled = busy && act !== "copy";
      return found;
    };
    const found = [];
    if (n > 1) {
      const [before, after] = [button("before", "‹", "Previous version"), button("after", "›", "Next version")];
      before.disabled ||= i === 0;
      after.disabled ||= i === n - 1;
      const count = element("span", { "aria-label": `Version ${i + 1} of ${n}` }, `${i + 1}/${n}`);
      found.push(element("span", { class: "branches" }, before, count, after));
    }
    if (live) return found;
    const mine = message.role === "user";
    const acts = [button("copy", "Copy"), button("edit", "Edit")];
    if (mine && !answered) acts.push(button("answer", "Answer"));
    if (!mine) acts.push(button("retry", "Retry"));
    if (!mine && last && !answered) acts.push(button("continue", "Continue"));
    if (!mine && message.has_state) acts.push(button("save", "Save state"), button("look", "See state"));
    acts.push(button("delete", "Delete"));
    found.push(element("span", { class: "acts" }, ...acts));
    const { usage } = message;
    const numbers = [
      ENDS[message.finish_reason],
      message.tokens_per_second && `${message.tokens_per_second.toFixed(1)} tokens/s`,
      usage && `${usage.completion_tokens} tokens`,
      usage && `${usage.cached_tokens} of ${usage.prompt_tokens} prompt tokens cached`,
      message.state_bytes && `state ${bytes(message.state_bytes)}`,
    ].filter(Boolean);
    if (numbers.length) found.push(element("p", { class: "numbers" }, numbers.join(" · ")));
    return found;
  }

  // More of the answer that is being written; shown with the next frame.
  add(pieces) {
    for (const [kind, text] of Object.entries(pieces)) this.pending[kind] += text;
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { content, reasoning } = this.pending;
    this.pending = { content: "", reasoning: "" };
    const article = this.root.lastElementChild;
    if (!article?.growing) return;
    if (reasoning) this.#think(article, reasoning);
    if (content) article.growing.add(content);
    article.thought += reasoning;
    article.shown += content;
    this.#follow();
  }

  of(id) {
    return [...this.root.children].find((article) => article.dataset.id === id);
  }

  #click(event) {
    const button = event.target.closest("button");
    const article = event.target.closest("article");
    if (button?.dataset.copy) this.#copy(button, button.closest(".code").querySelector("code").textContent);
    else if (button?.dataset.act === "copy") this.#copy(button, article.message.content);
    else if (button?.dataset.act === "edit") this.edit(article);
    else if (button?.dataset.act) this.act(button.dataset.act, article.message);
  }

  async #copy(button, text) {
    const done = await navigator.clipboard.writeText(text).then(() => "Copied", () => "Cannot copy here");
    button.textContent = done;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  // A message becomes a box; what is written in it becomes a branch.
  edit(article) {
    if (article.querySelector("form")) return;
    const { message } = article;
    const box = element("textarea", { "aria-label": "Edit the message" });
    const send = element("button", { class: "main" }, message.role === "user" ? "Send" : "Save");
    const cancel = element("button", { type: "button" }, "Cancel");
    const form = element("form", { class: "edit" }, box, element("div", { class: "row" }, cancel, send));
    const close = () => {
      form.remove();
      article.classList.remove("editing");
      article.querySelector('[data-act="edit"]')?.focus();
    };
    box.value = message.content;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!box.value.trim()) return;
      close();
      this.act("edited", message, box.value);
    });
    cancel.addEventListener("click", close);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    sendsOnEnter(box, form);
    article.classList.add("editing");
    article.querySelector(".content").after(form);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }
}

// Enter sends, but not the one that ends the composing of a character.
export function sendsOnEnter(box, form) {
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    form.requestSubmit();
  });
}
