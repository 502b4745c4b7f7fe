// The sheet with the kept states.
import { download, get, path, remove, request } from "./api.js";
import { $, ask, attempt } from "./dialogs.js";
import { element } from "./markdown.js";

const dialog = $("#states");
const error = $(".error", dialog);
const list = $("ul", dialog);
let begin = () => {};

// beginFrom: called with the state that a conversation is to begin from.
export async function openStates(beginFrom) {
  begin = beginFrom;
  dialog.showModal();
  await draw();
}

const draw = () => attempt(error, async () => {
  const states = (await get(path("states"))).data;
  list.replaceChildren(...states.map(row));
  if (!states.length) list.append(element("li", { class: "hint" }, "There is none yet."));
});

function row(state) {
  const button = (words, action) => {
    const found = element("button", { type: "button", "aria-label": `${words}: ${state.id}` }, words);
    found.addEventListener("click", () => attempt(error, action));
    return found;
  };
  const about = [state.model, state.tokens === null ? null : `${state.tokens} tokens`, `${(state.bytes / 1e6).toFixed(1)} MB`];
  return element("li", {},
    element("strong", {}, state.id),
    element("p", { class: "numbers" }, about.filter(Boolean).join(" · ")),
    element("p", { class: "text" }, state.text_end ?? ""),
    element("div", { class: "acts" },
      button("Begin a conversation", () => {
        dialog.close();
        begin(state);
      }),
      button("Download", async () => {
        const reply = await request(path("states", state.id, "content"));
        download(await reply.blob(), `${state.id}.safetensors`);
      }),
      button("Delete", async () => {
        if (await ask({ title: `Delete the state ${state.id}?`, action: "Delete" }) === null) return;
        await remove(path("states", state.id));
        await draw();
        $("#upload").focus();
      })));
}

$("#upload").addEventListener("click", () => $("#upload-file").click());
$("#upload-file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (!file) return;
  const value = file.name.replace(/\.[^.]*$/, "").replace(/[^\w.:@-]/g, "-");
  const name = await ask({ title: "Upload a state", action: "Upload", label: "Name", value });
  if (!name) return;
  const done = await attempt(error, () => request(path("states", name), { method: "PUT", body: file }));
  if (done) await draw();
});
