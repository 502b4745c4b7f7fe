// "Type a conversation, see the bytes": what heronry/text/chat_templates.py does without tools, on the fields of its
// templates, which the page holds as JSON. tests/test_site.py compares the two on many conversations.
"use strict";

function promptFormats({ templates, thinking, whiteSpace }) {
  function strip(text) {
    const characters = [...text];
    const isText = (character) => !whiteSpace.includes(character);
    const first = characters.findIndex(isText);
    return first < 0 ? "" : characters.slice(first, characters.findLastIndex(isText) + 1).join("");
  }

  function withoutMarks(template, text) {
    const mark = strip(template.separator);
    return mark ? text.replaceAll(mark, "") : text;
  }

  function clean(template, message) {
    const text = strip(withoutMarks(template, message.replaceAll("\r\n", "\n")));
    if (!text) throw new Error("the message is empty");
    return template.collapse ? text.replace(/\n+/g, "\n") : text;
  }

  function oneTurn(template, answer) {
    const text = withoutMarks(template, strip(answer.replaceAll("\r\n", "\n")));
    return template.stops.some((stop) => text.includes(stop)) ? text.replace(/\n+/g, "\n") : text;
  }

  // A message of the user, and what comes between it and its answer.
  function question(template, message) {
    const texts = [strip(message.content), strip(message.input ?? "")];
    if (template.turn_with_input === null || !texts[1]) {
      const turn = template.turn.slice(0, template.turn.length - template.opening.length);
      const at = turn.indexOf("{user}");
      const text = clean(template, texts.filter(Boolean).join("\n"));
      return [turn.slice(0, at) + text, turn.slice(at + "{user}".length)];
    }
    const [user, input] = texts.map((text) => clean(template, text));
    const end = template.turn_with_input.lastIndexOf("}") + 1;
    const form = template.turn_with_input.slice(0, end);
    const text = form.replace(/\{(user|input)\}/g, (_, name) => (name === "user" ? user : input));
    return [text, template.turn_with_input.slice(end)];
  }

  // What ends a question that has no answer.
  function breakOf(template, lead) {
    if (!lead) return "";
    return (lead.endsWith(template.label) ? lead.slice(0, lead.length - template.label.length) : lead) || template.separator;
  }

  // The opening of an answer and the rest of it, if the model goes on with a text.
  function beginAnswer(template, opening, answer) {
    const text = oneTurn(template, answer);
    if ((template.space + text).startsWith(opening)) return template.space + text;
    if (opening.endsWith("</think") && !text.startsWith("<think")) return `${opening}>\n${text}`;
    return template.space + text;
  }

  // The prompt for an answer to [{role, content, input?}, ...], or to go on with if the last one is of the assistant.
  // Throws an Error that says what is wrong with the messages.
  function render(name, messages, think = null) {
    const template = templates[name];
    if (!messages.length) throw new Error("there are no messages");
    messages.forEach((message, i) => {
      if (message.role === "user" && !strip(message.content)) throw new Error(`message ${i + 1} is empty`);
    });
    const mode = think === null ? null : thinking[think];
    const opening = mode === null ? template.opening : mode.opening && template.space + mode.opening;
    const lastUser = messages.findLastIndex((message) => message.role === "user");
    const isBegun = messages.at(-1).role === "assistant";
    const front = messages.findIndex((message) => message.role !== "system");
    const systems = messages.slice(0, front < 0 ? messages.length : front).filter((message) => strip(message.content));
    const shown = messages.slice(front < 0 ? messages.length : front, isBegun ? -1 : undefined);
    const show = (content) => template.system.replaceAll("{system}", () => clean(template, content));
    let text = systems.length ? show(systems.map((message) => clean(template, message.content)).join("\n")) : "";
    let lead = "";
    shown.forEach((message) => {
      if (message.role === "assistant") {
        const said = oneTurn(template, message.content);
        text += (lead || template.label) + (said && template.space + said) + template.separator;
        lead = "";
      } else if (message.role === "user") {
        const hint = mode !== null && message === messages[lastUser] ? mode.hint : "";
        const [asked, next] = question(template, { ...message, content: clean(template, message.content) + hint });
        text += breakOf(template, lead) + asked;
        lead = next;
      } else if (strip(message.content)) {
        text += breakOf(template, lead) + show(message.content);
        lead = "";
      }
    });
    text += lead || template.label;
    const begun = isBegun ? strip(messages.at(-1).content) : "";
    return text + (begun ? beginAnswer(template, opening, begun) : opening);
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
  const parts = ["template", "think", "messages", "add", "result", "bytes", "stops"];
  const [choice, think, list, add, result, bytes, stops] = parts.map((name) => form.querySelector(`[data-part=${name}]`));
  for (const name of Object.keys(data.templates)) choice.add(new Option(name));
  think.add(new Option("as the format has it", ""));
  for (const name of Object.keys(data.thinking)) think.add(new Option(name));

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
      const text = render(choice.value, messages, think.value || null);
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
