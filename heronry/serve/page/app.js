// The page: what is where, and what the keys do.
import { ApiError, download, get, onKeyNeeded, path, post, remove } from "./api.js";
import { Conversation, onOtherTab } from "./conversation.js";
import { $, ask, attempt, showError } from "./dialogs.js";
import { element } from "./markdown.js";
import { Messages, sendsOnEnter } from "./messages.js";
import { Picture } from "./picture.js";
import { loadModels, modelOf, openSettings } from "./settings.js";
import { openStates } from "./states.js";

const box = $("#box");
const listError = $("#list-error");
const errorPlace = $("#error");
const picture = new Picture($("#picture"));
const wantsPicture = $("#show-picture");
const messages = new Messages($("#messages"), $("#scroll"), $("#to-end"), act);
const running = new Set(); // conversations in which an answer is being written: they go on while another is shown
let conversation = null;
let conversations = [];

// The key

let asking = null;
onKeyNeeded((why) => {
  asking ??= ask({ title: why, action: "Use it", label: "API key", type: "password" }).finally(() => { asking = null; });
  return asking;
});

// The conversation that is shown

function show(next) {
  if (conversation) conversation.changed = () => {};
  conversation = next;
  conversation.changed = changed;
  picture.root.hidden = true;
  messages.following = true;
  draw();
  closeDrawer();
  box.focus();
}

function draw() {
  const { title, settings } = conversation.about;
  const busy = Boolean(conversation.controller);
  messages.draw(conversation);
  $("#title").textContent = title;
  document.title = `${title} · heronry`;
  $("#model-name").textContent = modelOf(settings)?.id ?? "";
  for (const id of ["rename", "export", "delete"]) $(`#${id}`).disabled = !conversation.id;
  $("#send").hidden = busy;
  $("#stop").hidden = !busy;
  const { failed } = conversation;
  showError(errorPlace, failed, () => {
    if (box.value === failed.body.content) box.value = "";
    answer(failed.body);
  });
  for (const link of $("#conversations").querySelectorAll("a")) {
    if (link.hash.slice(1) === conversation.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function changed(what, data) {
  if (what === "text") {
    messages.add(data);
  } else if (what === "state") {
    picture.root.hidden = !wantsPicture.checked;
    if (wantsPicture.checked) picture.draw(data);
  } else if (what === "said") {
    messages.flush();
    $("#said").textContent = data.content;
  } else if (what === "list") {
    if (conversation.id && location.hash.slice(1) !== conversation.id) history.pushState(null, "", `#${conversation.id}`);
    draw();
    drawList();
  } else draw();
}

async function openFromAddress() {
  const id = location.hash.slice(1);
  if (id === (conversation.id ?? "")) return;
  const found = await attempt(errorPlace, async () =>
    (!id ? new Conversation() : [...running].find((x) => x.id === id) ?? await Conversation.open(id)));
  if (found && id === location.hash.slice(1)) show(found);
}

function begin(settings = {}) {
  if (location.hash) history.pushState(null, "", location.pathname);
  show(new Conversation({ title: "New conversation", settings }));
}

async function answer(body) {
  const current = conversation;
  messages.following = true;
  running.add(current);
  await current.answer(body, wantsPicture.checked);
  running.delete(current);
  const unsent = current.failed?.body.content; // what the server did not take stays in the box
  if (unsent && current === conversation && !box.value) box.value = unsent;
}

async function act(what, message, text) {
  const { tree } = conversation;
  const siblings = tree.siblings(message.id);
  const i = siblings.indexOf(message.id);
  const on = (action) => attempt(errorPlace, action);
  if (what === "before" || what === "after") {
    const id = siblings[i + (what === "before" ? -1 : 1)];
    await on(async () => {
      const done = conversation.choose(id);
      const article = messages.of(id);
      (article.querySelector(`[data-act=${what}]:enabled`) ?? article.querySelector(".branches :enabled")).focus();
      await done;
    });
  } else if (what === "edited" && message.role === "assistant") {
    await on(() => conversation.write(message.parent, "assistant", text));
  } else if (what === "edited") {
    box.focus();
    await answer({ parent: message.parent, content: text });
  } else if (what === "retry" || what === "answer") {
    box.focus();
    await answer({ parent: what === "retry" ? message.parent : message.id });
  } else if (what === "continue") {
    box.focus();
    await answer({ continue: message.id });
  } else if (what === "save") {
    const name = await ask({ title: "Save the state after this answer", action: "Save", label: "Name" });
    if (name) {
      await on(async () => {
        await post(path("conversations", conversation.id, "messages", message.id, "state"), { name });
        $("#said").textContent = `Saved as ${name}`;
      });
    }
  } else if (what === "look") {
    await on(async () => {
      picture.draw(await get(path("conversations", conversation.id, "messages", message.id, "state")));
      wantsPicture.checked = true;
      picture.root.hidden = false;
    });
  } else if (what === "delete") {
    const more = tree.branch(message.id).length - 1;
    const title = more ? `Delete this message and the ${more} below it?` : "Delete this message?";
    if (await ask({ title, action: "Delete" }) !== null) await on(() => conversation.remove(message.id));
    box.focus();
  }
}

// The message box

sendsOnEnter(box, $("#composer"));
$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = box.value;
  if (!content.trim() || conversation.controller) return;
  box.value = "";
  box.focus();
  answer({ parent: conversation.leaf, content });
});
box.addEventListener("keydown", (event) => {
  if (event.key !== "ArrowUp" || box.value || event.isComposing || conversation.controller) return;
  const last = conversation.messages.findLast((message) => message.role === "user");
  if (!last) return;
  event.preventDefault();
  messages.edit(messages.of(last.id));
});

function stop() {
  conversation.stop();
  $("#said").textContent = "Stopped";
  box.focus();
}
$("#stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || $("dialog[open]")) return;
  if ($("#menu").open) closeMenu();
  else if (document.body.classList.contains("drawn")) closeDrawer();
  else if (conversation?.controller) stop();
});

wantsPicture.checked = localStorage.getItem("picture") !== "off";
wantsPicture.addEventListener("change", () => {
  localStorage.setItem("picture", wantsPicture.checked ? "on" : "off");
  picture.root.hidden = !wantsPicture.checked || !picture.layers;
});

// The list

async function drawList() {
  await attempt(listError, async () => {
    conversations = (await get(path("conversations"))).data;
    filter();
  });
}

function filter() {
  const words = $("#search").value.toLowerCase();
  const found = conversations.filter((x) => x.title.toLowerCase().includes(words));
  $("#conversations").replaceChildren(...found.map((x) => element("li", {}, element("a", {
    href: `#${x.id}`, title: x.title, ...(x.id === conversation?.id ? { "aria-current": "page" } : {}),
  }, x.title || "Untitled"))));
}
$("#search").addEventListener("input", filter);
$("#new").addEventListener("click", () => begin());
addEventListener("hashchange", openFromAddress);
addEventListener("popstate", openFromAddress);
$("#conversations").addEventListener("click", (event) => event.target.closest("a") && closeDrawer());

$("#import").addEventListener("click", () => $("#import-file").click());
$("#import-file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (!file) return;
  await attempt(listError, async () => {
    let tree;
    try {
      tree = JSON.parse(await file.text());
    } catch {
      throw new ApiError(0, "this file is no exported conversation");
    }
    location.hash = (await post(path("conversations", "import"), tree)).id;
    await drawList();
  });
});
$("#open-states").addEventListener("click", () => {
  closeDrawer();
  openStates((state) => begin({ state: state.id, model: state.model }));
});

// The head

const closeMenu = () => { $("#menu").open = false; };
document.addEventListener("click", (event) => !event.target.closest("summary") && closeMenu());
$("#open-settings").addEventListener("click", () => openSettings(conversation));
$("#settings").addEventListener("close", draw);
$("#rename").addEventListener("click", async () => {
  const { title: value } = conversation.about;
  const title = await ask({ title: "Rename the conversation", action: "Rename", label: "Title", value });
  if (title) await attempt(errorPlace, () => conversation.change({ title }));
  box.focus();
});
$("#export").addEventListener("click", () => attempt(errorPlace, async () => {
  const name = conversation.about.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  download(await conversation.export(), `${name}.json`);
  box.focus();
}));
$("#delete").addEventListener("click", async () => {
  const { id, about } = conversation;
  if (await ask({ title: `Delete “${about.title}” with all its branches?`, action: "Delete" }) === null) return;
  conversation.stop();
  await attempt(errorPlace, async () => {
    await remove(path("conversations", id));
    begin();
    await drawList();
  });
});

// The drawer of narrow screens

const narrow = matchMedia("(max-width: 800px)");
function setDrawer(open) {
  document.body.classList.toggle("drawn", open);
  $("#open-drawer").setAttribute("aria-expanded", open);
  $("#shade").hidden = !open;
  $("#drawer").inert = narrow.matches && !open;
  $("#side").inert = narrow.matches && open;
}
function closeDrawer() {
  const was = document.body.classList.contains("drawn");
  setDrawer(false);
  if (was) box.focus();
}
$("#open-drawer").addEventListener("click", () => {
  setDrawer(true);
  $("#close-drawer").focus();
});
$("#close-drawer").addEventListener("click", closeDrawer);
$("#shade").addEventListener("click", closeDrawer);
narrow.addEventListener("change", () => setDrawer(false));
setDrawer(false);

// Other tabs

const refresh = () => attempt(listError, async () => {
  await conversation?.refresh();
  await drawList();
});
onOtherTab(refresh);
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && refresh());

show(new Conversation()); // whoever is quick may write before the rest is here
await attempt(listError, async () => {
  await loadModels();
  draw();
});
await openFromAddress();
await drawList();
