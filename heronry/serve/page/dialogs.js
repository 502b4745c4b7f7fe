// Questions, errors in one line, and sheets.
import { element } from "./markdown.js";

export const $ = (selector, root = document) => root.querySelector(selector);

// Asks for a value, or only whether to go on. Resolves to the value ("" without a label), or null.
export function ask({ title, action, label = "", value = "", type = "text" }) {
  const dialog = $("#ask");
  const input = $("input", dialog);
  $("h2", dialog).textContent = title;
  $("label span", dialog).textContent = label;
  $("label", dialog).hidden = !label;
  $(".main", dialog).textContent = action;
  Object.assign(input, { value, type, required: Boolean(label) });
  dialog.returnValue = "";
  dialog.showModal();
  (label ? input : $(".main", dialog)).focus();
  input.select();
  return new Promise((done) => dialog.addEventListener("close", () => {
    const found = dialog.returnValue === "yes" ? input.value.trim() : null;
    input.value = "";
    done(found);
  }, { once: true }));
}

$("#ask [value=no]").addEventListener("click", () => $("#ask").close());

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { // on what is around it
    if (event.target === dialog) dialog.close();
  });
}

// Says what went wrong where it did; with a way to try again.
export function showError(place, error, retry) {
  place.hidden = !error;
  place.replaceChildren(error?.message ?? "");
  if (error && retry) {
    const button = element("button", { type: "button" }, "Try again");
    button.addEventListener("click", () => {
      showError(place, null);
      retry();
    });
    place.append(" ", button);
  }
}

// Does something, and where it fails says so at a place, with a way to try again.
export async function attempt(place, action) {
  try {
    showError(place, null);
    return await action();
  } catch (error) {
    if (!error.message) throw error;
    showError(place, error, () => attempt(place, action));
    return undefined;
  }
}
