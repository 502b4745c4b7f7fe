// A subset of Markdown, as DOM nodes. Text comes in as text nodes only; there is no raw HTML, and no image: a picture's
// address could carry what was said to another host. Reading takes time in proportion to the text, whatever is in it.
const DEEPEST = 16; // of quotes, lists and emphasis in one another

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const LINK = /\[((?:[^[\]\\]|\\.)*)\]\([ \t]*<?(https?:\/\/[^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:[ \t]+"[^"]*")?[ \t]*\)/iy;
const ADDRESS = /https?:\/\/[^\s<>"`]+/iy;

export function element(name, attributes = {}, ...children) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

function isTable(lines, i) {
  return i + 1 < lines.length && lines[i].includes("|") && DELIMITERS.test(lines[i + 1])
    && cells(lines[i]).length === cells(lines[i + 1]).length;
}

// Whether a line ends the paragraph before it.
function begins(lines, i) {
  const line = lines[i];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, i)
    || (item !== null && item[1].length < 4 && item[0].length < line.length && !/^[02-9]|^1\d/.test(item[2]));
}

// The blocks of some lines: {kind, start, …}. More lines change the last block only, or follow it.
function blocks(lines) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const start = i;
    let match;
    if (isBlank(line)) {
      i++;
    } else if ((match = FENCE.exec(line))) {
      const [, mark, language] = match;
      const indent = indentOf(line);
      const end = new RegExp(`^ {0,3}[${mark[0]}]{${mark.length},}[ \\t]*$`);
      for (i++; i < lines.length && !end.test(lines[i]); i++);
      const last = i === lines.length && i > start + 1 && lines[i - 1] === "" ? i - 1 : i; // more of it may follow
      const inside = lines.slice(start + 1, last).map((x) => x.slice(Math.min(indent, indentOf(x))));
      i++;
      found.push({ kind: "code", start, language: language.trim().split(/\s/)[0], text: inside.join("\n") });
    } else if ((match = HEADING.exec(line))) {
      let text = line.slice(match[0].length).trim();
      let end = text.length;
      while (text[end - 1] === "#") end--;
      if (end === 0 || " \t".includes(text[end - 1])) text = text.slice(0, end).trimEnd();
      found.push({ kind: `h${match[1].length}`, start, text });
      i++;
    } else if (RULE.test(line)) {
      found.push({ kind: "hr", start });
      i++;
    } else if (QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      found.push({ kind: "blockquote", start, lines: lines.slice(start, i).map((x) => x.replace(QUOTE, "")) });
    } else if ((match = ITEM.exec(line)) && match[1].length < 4) {
      const list = readList(lines, i, match[2]);
      found.push({ ...list, start });
      i = list.end;
    } else if (isTable(lines, i)) {
      for (i += 2; i < lines.length && !isBlank(lines[i]) && !begins(lines, i); i++);
      found.push({ kind: "table", start, lines: lines.slice(start, i) });
    } else {
      for (i++; i < lines.length && !isBlank(lines[i]) && !begins(lines, i); i++);
      found.push({ kind: "p", start, text: lines.slice(start, i).map((x) => x.trimStart()).join("\n").trimEnd() });
    }
  }
  return found;
}

// A list from line i on; its items are lines. What is indented by two spaces is inside: models are not exact with it.
function readList(lines, i, mark) {
  const kind = mark.length > 1 ? "ol" : "ul";
  const items = [];
  let loose = false;
  let end = i;
  for (; i < lines.length;) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length > 3 || match[2].at(-1) !== mark.at(-1) || RULE.test(lines[i])) break;
    const own = match[1].length;
    const width = match[0].length - own > match[2].length + 4 ? own + match[2].length + 1 : match[0].length;
    const item = [lines[i].slice(width)];
    let fence = FENCE.test(item[0]);
    let blank = false;
    let next = i + 1;
    for (; next < lines.length; next++) {
      const line = lines[next];
      if (isBlank(line)) {
        blank = true;
        item.push("");
        continue;
      }
      const indent = indentOf(line);
      if (indent < own + 2 && (blank || fence || ITEM.test(line) || begins(lines, next))) break;
      if (indent >= own + 2 && FENCE.test(line.trimStart())) fence = !fence;
      if (blank && indent < own + 5 && !fence) loose ||= !ITEM.test(line);
      blank = false;
      item.push(line.slice(Math.min(width, indent)));
    }
    while (item.length && isBlank(item.at(-1))) item.pop();
    items.push(item);
    end = i + Math.max(item.length, 1);
    const after = next < lines.length ? ITEM.exec(lines[next]) : null;
    if (blank && after && after[1].length < 4 && after[2].at(-1) === mark.at(-1)) loose = true;
    i = next;
  }
  return { kind, first: parseInt(mark, 10), items, loose, end };
}

// The cells of a line of a table: | is no border behind a backslash or in code.
function cells(line) {
  const found = [""];
  const text = line.trim().replace(/^\|/, "");
  let code = false;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "`") code = !code;
    if (text[i] === "\\" && text[i + 1] === "|") found[found.length - 1] += text[++i];
    else if (text[i] === "|" && !code) found.push("");
    else found[found.length - 1] += text[i];
  }
  if (found.length > 1 && isBlank(found.at(-1))) found.pop();
  return found.map((x) => x.trim());
}

function table(lines) {
  const [head, marks, ...rows] = lines.map(cells);
  const sides = marks.map((x) => (x.endsWith(":") ? (x.startsWith(":") ? "center" : "right") : ""));
  const row = (texts, name) => element("tr", {}, ...head.map((_, i) =>
    element(name, sides[i] ? { class: sides[i] } : {}, ...inline(texts[i] ?? ""))));
  return element("div", { class: "table", tabindex: "0" }, element("table", {},
    element("thead", {}, row(head, "th")), element("tbody", {}, ...rows.map((texts) => row(texts, "td")))));
}

function codeBlock({ language, text }) {
  const copy = element("button", { type: "button", class: "copy", "data-copy": "code" }, "Copy");
  const head = element("div", { class: "head" }, element("span", {}, language), copy);
  return element("div", { class: "code" }, head, element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function build(block, depth) {
  const { kind } = block;
  if (kind === "hr") return element("hr");
  if (kind === "code") return codeBlock(block);
  if (kind === "table") return table(block.lines);
  if (kind === "blockquote") return element(kind, {}, ...nodes(block.lines, depth + 1));
  if (!block.items) return element(kind, {}, ...inline(block.text));
  const list = element(kind, kind === "ol" && block.first !== 1 ? { start: block.first } : {});
  for (const item of block.items) {
    const inside = depth < DEEPEST ? blocks(item) : [{ kind: "p", text: item.join("\n") }];
    list.append(element("li", {}, ...inside.flatMap((x) =>
      (x.kind === "p" && !block.loose ? inline(x.text) : [build(x, depth + 1)]))));
  }
  return list;
}

function nodes(lines, depth) {
  if (depth > DEEPEST) return [document.createTextNode(lines.join("\n"))];
  return blocks(lines).map((block) => build(block, depth));
}

export const split = (text) => text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");

// The whole of a text.
export const render = (text) => nodes(split(text), 0);

// A text that grows: what is finished stays as it is, and only its last block is made again.
export class Growing {
  constructor(root) {
    this.root = root;
    this.rest = ""; // the text from the beginning of the last block
    this.last = []; // its nodes
  }

  add(text) {
    this.rest += text;
    const whole = this.rest.lastIndexOf("\n");
    if (text.includes("\n")) {
      const lines = split(this.rest.slice(0, whole));
      const start = blocks(lines).at(-1)?.start ?? 0;
      if (start > 0) {
        this.#show(nodes(lines.slice(0, start), 0));
        this.last = [];
        this.rest = this.rest.split(/\r\n?|\n/).slice(start).join("\n");
      }
    }
    this.#show(render(this.rest));
  }

  #show(fresh) {
    const [old] = this.last;
    if (this.last.length === 1 && fresh.length === 1 && old.className === "code" && fresh[0].className === "code") {
      const [code, grown] = [old, fresh[0]].map((x) => x.querySelector("code").firstChild);
      if (code && grown?.data.startsWith(code.data)) { // a selection in it, and its button, stay
        code.appendData(grown.data.slice(code.length));
        old.querySelector("span").textContent = fresh[0].querySelector("span").textContent;
        return;
      }
    }
    for (const node of this.last) node.remove();
    this.root.append(...fresh);
    this.last = fresh;
  }
}

function link(address, ...children) {
  return element("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" }, ...children);
}

// The nodes of the text of one block. links: whether there may be any, for there is none in a link.
export function inline(text, links = true) {
  const found = []; // nodes so far
  const open = []; // emphasis that may still be closed: {mark, count, at}
  const missing = new Set(); // runs of ` that nothing closes
  let plain = "";
  const flush = () => {
    if (plain) found.push(document.createTextNode(plain));
    plain = "";
  };
  for (let i = 0; i < text.length;) {
    const c = text[i];
    let match = null;
    if (c === "\\" && i + 1 < text.length && /[!-/:-@[-`{-~\n]/.test(text[i + 1])) {
      if (text[i + 1] === "\n") i++;
      else plain += text[i + 1], i += 2;
    } else if (c === "\n") {
      plain = plain.trimEnd();
      flush();
      found.push(element("br"));
      for (i++; text[i] === " "; i++);
    } else if (c === "`") {
      let end = i;
      while (text[end] === "`") end++;
      const run = text.slice(i, end);
      let close = missing.has(run.length) ? -1 : end;
      for (; close >= 0; close += run.length) {
        close = text.indexOf(run, close);
        if (close < 0 || (text[close + run.length] !== "`" && text[close - 1] !== "`")) break;
        while (text[close + run.length] === "`") close++;
      }
      if (close < 0) {
        missing.add(run.length);
        plain += run;
        i = end;
      } else {
        const code = text.slice(end, close).replace(/\n/g, " ");
        flush();
        found.push(element("code", {}, /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code));
        i = close + run.length;
      }
    } else if (links && c === "[" && (LINK.lastIndex = i, match = LINK.exec(text))) {
      if (plain.endsWith("!")) plain = plain.slice(0, -1); // an image: its words, and where it is
      flush();
      found.push(link(match[2], ...inline(match[1] || match[2], false)));
      i += match[0].length;
    } else if (links && (c === "h" || c === "H") && !/[\w/]/.test(text[i - 1] ?? "")
        && (ADDRESS.lastIndex = i, match = ADDRESS.exec(text))) {
      let address = match[0];
      for (let more = true; more;) {
        const last = address.at(-1);
        more = ".,:;!?'*_~|]".includes(last) || (last === ")" && !address.includes("("));
        if (more) address = address.slice(0, -1);
      }
      flush();
      found.push(link(address, address));
      i += address.length;
    } else if (c === "*" || c === "_" || c === "~") {
      let end = i;
      while (text[end] === c) end++;
      const [before, after] = [text[i - 1] ?? " ", text[end] ?? " "];
      const space = [before, after].map((x) => /\s/.test(x));
      const sign = [before, after].map((x) => /[\p{P}\p{S}]/u.test(x));
      let opens = !space[1] && (!sign[1] || space[0] || sign[0]);
      let closes = !space[0] && (!sign[0] || space[1] || sign[1]);
      if (c === "_") [opens, closes] = [opens && (!closes || sign[0]), closes && (!opens || sign[1])];
      if (c === "~" && end - i !== 2) opens = closes = false;
      flush();
      let count = end - i;
      while (closes && count && open.some((x) => x.mark === c)) {
        while (open.at(-1).mark !== c) open.pop();
        const from = open.at(-1);
        const used = count > 1 && from.count > 1 ? 2 : 1;
        const inside = found.splice(from.at + 1);
        found.push(element(c === "~" ? "del" : used === 2 ? "strong" : "em", {}, ...inside));
        from.count -= used;
        count -= used;
        if (from.count) found[from.at].data = c.repeat(from.count);
        else found.splice(open.pop().at, 1);
      }
      if (count) {
        if (opens && open.length < DEEPEST) open.push({ mark: c, count, at: found.length });
        found.push(document.createTextNode(c.repeat(count)));
      }
      i = end;
    } else {
      plain += c;
      i++;
    }
  }
  flush();
  return found;
}
