// "Type a conversation, see the bytes": what heronry/text/chat_templates.py does, on the fields of its templates, which
// the page holds as JSON. tests/test_site.py compares the two on many conversations.
"use strict";

function promptFormats({ templates, whiteSpace }) {
  const ends = { assistant: ["user"], user: ["system", "assistant", undefined], system: [undefined] };

  function strip(text) {
    const characters = [...text];
    const isText = (character) => !whiteSpace.includes(character);
    const first = characters.findIndex(isText);
    return first < 0 ? "" : characters.slice(first, characters.findLastIndex(isText) + 1).join("");
  }

  function clean(template, message) {
    const text = strip(message.replaceAll("\r\n", "\n"));
    if (!text) throw new Error("the message is empty");
    return template.collapse ? text.replace(/\n+/g, "\n") : text;
  }

  function ask(template, message) {
    const texts = [strip(message.content), strip(message.input ?? "")];
    if (template.turn_with_input === null || !texts[1]) {
      return template.turn.replaceAll("{user}", () => clean(template, texts.filter(Boolean).join("\n")));
    }
    const [user, input] = texts.map((text) => clean(template, text));
    return template.turn_with_input.replace(/\{(user|input)\}/g, (_, name) => (name === "user" ? user : input));
  }

  function oneTurn(template, answer) {
    const text = strip(answer.replaceAll("\r\n", "\n"));
    return template.stops.some((stop) => text.includes(stop)) ? text.replace(/\n+/g, "\n") : text;
  }

  // The text of a conversation, [{role, content, input?}, ...], up to where the model goes on. Throws an Error that says
  // what is wrong with the messages.
  function render(name, messages) {
    const template = templates[name];
    let text = "";
    messages.forEach((message, i) => {
      const before = messages[i - 1]?.role;
      if (message.role !== "assistant" && !strip(message.content)) throw new Error(`message ${i + 1} is empty`);
      if (!ends[message.role].includes(before)) {
        throw new Error(`a message of '${message.role}' cannot ${before ? `follow one of '${before}'` : "be the first"}`);
      }
      if (message.role === "system") {
        text += template.system.replaceAll("{system}", () => clean(template, message.content));
      } else if (message.role === "assistant") {
        text += template.space + oneTurn(template, message.content) + template.separator;
      } else {
        const asked = ask(template, message);
        const isLast = i === messages.length - 1;
        text += isLast || !asked.endsWith(template.opening) ? asked : asked.slice(0, asked.length - template.opening.length);
      }
    });
    return text;
  }

  return { render };
}

function hexDump(text) {
  const bytes = [...new TextEncoder().encode(text)];
  const rows = [];
  for (let at = 0; at < bytes.length; at += 8) {
    const row = bytes.slice(at, at + 8);
    const hex = row.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const shown = row.map((byte) => (byte > 32 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    rows.push(`${at.toString(16).padStart(4, "0")}  ${hex.padEnd(23)}  ${shown}`);
  }
  return rows.join("\n");
}

function showPromptFormats(form, data) {
  const { render } = promptFormats(data);
  const [choice, list, add, result, bytes, stops] = ["template", "messages", "add", "result", "bytes", "stops"].map(
    (name) => form.querySelector(`[data-part=${name}]`),
  );
  for (const name of Object.keys(data.templates)) choice.add(new Option(name));

  function addMessage(role, content) {
    const row = form.querySelector("template").content.cloneNode(true).firstElementChild;
    row.querySelector("select").value = role;
    row.querySelector("textarea").value = content;
    row.querySelector("button").addEventListener("click", () => {
      row.remove();
      show();
    });
    list.append(row);
  }

  function show() {
    const template = data.templates[choice.value];
    const messages = [...list.children].map((row) => {
      const input = row.querySelector("input");
      const role = row.querySelector("select").value;
      input.hidden = role !== "user";
      const message = { role, content: row.querySelector("textarea").value };
      return input.hidden || !input.value ? message : { ...message, input: input.value };
    });
    try {
      const text = render(choice.value, messages);
      result.textContent = text.replaceAll("\n", "⏎\n");
      bytes.textContent = hexDump(text);
    } catch (error) {
      result.textContent = error.message;
      bytes.textContent = "";
    }
    stops.textContent = template.stops.map((stop) => JSON.stringify(stop)).join(", ");
  }

  addMessage("system", "You are a patient teacher.");
  addMessage("user", "What is a heronry?");
  add.addEventListener("click", () => {
    addMessage(list.lastElementChild?.querySelector("select").value === "user" ? "assistant" : "user", "");
    show();
  });
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  choice.value = "g1";
  form.hidden = false;
  show();
}

if (typeof document !== "undefined") {
  document.addEventListener("DOMContentLoaded", () => {
    const data = document.getElementById("prompt-formats-data");
    showPromptFormats(document.querySelector("form.prompt-formats"), JSON.parse(data.textContent));
  });
}
