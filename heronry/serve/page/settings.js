// The sheet with the settings of a conversation. A change is kept at once.
import { get, path } from "./api.js";
import { $, attempt } from "./dialogs.js";

const dialog = $("#settings");
const form = $("form", dialog);
const error = $(".error", dialog);
let models = [];
let presets = [];
let conversation = null;

export async function loadModels() {
  [models, presets] = (await Promise.all([get(path("models")), get(path("presets"))])).map((list) => list.data);
}

export const modelOf = (settings) => models.find((model) => model.id === settings.model) ?? models[0];

function fill(name, values, empty) {
  form.elements[name].replaceChildren(new Option(empty, ""), ...values.map((value) => new Option(value)));
}

// What may be chosen, and what stands for an empty field: both follow the model and the preset.
function hint() {
  const { settings } = conversation.about;
  const { meta } = modelOf(settings);
  fill("template", meta.templates ?? [], `the model's own${meta.template ? `: ${meta.template}` : ""}`);
  fill("think", meta.thinks ?? [], "as the template has it");
  for (const name of ["template", "think"]) form.elements[name].value = settings[name] ?? "";
  const preset = presets.find((x) => x.id === settings.preset);
  for (const input of form.querySelectorAll("[type=number]")) input.placeholder = preset?.[input.name] ?? "";
}

export async function openSettings(current) {
  conversation = current;
  dialog.showModal();
  const { settings } = conversation.about;
  fill("model", models.map((model) => model.id), `the server's first: ${models[0].id}`);
  fill("preset", presets.map((preset) => preset.id), "the template's");
  hint();
  for (const input of form.elements) {
    const value = settings[input.name];
    if (input.name) input.value = input.name === "stop" ? (value ?? []).join("\n") : value ?? "";
  }
  await attempt(error, async () => {
    fill("state", (await get(path("states"))).data.map((state) => state.id), "none");
    form.elements.state.value = settings.state ?? "";
  });
}

form.addEventListener("change", ({ target }) => {
  let value = target.value === "" ? null : target.value;
  if (!target.checkValidity()) {
    error.hidden = false;
    error.textContent = target.validationMessage;
    return;
  }
  if (target.type === "number" && value !== null) value = Number(value);
  if (target.name === "system") value ??= "";
  if (target.name === "stop") value = target.value.split("\n").filter(Boolean);
  attempt(error, async () => {
    await conversation.change({ settings: { [target.name]: value } });
    hint();
  });
});
form.addEventListener("keydown", (event) => { // Enter in a field is no wish to leave
  if (event.key === "Enter" && event.target.tagName === "INPUT") event.preventDefault();
});
