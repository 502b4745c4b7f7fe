// The state as a picture: a row a layer, a cell a head, by the norm of its memory.
import { $ } from "./dialogs.js";

const number = (x) => (x >= 100 ? x.toFixed(0) : x.toPrecision(2));

export class Picture {
  constructor(root) {
    this.root = root;
    this.canvas = $("canvas", root);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#say(this.words));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.layers && this.draw(this));
  }

  // layers: the norms of each layer's heads.
  draw({ layers, tokens }) {
    Object.assign(this, { layers, tokens });
    const { canvas } = this;
    const columns = Math.max(...layers.map((heads) => heads.length));
    const [cell, gap] = [8, 2];
    canvas.width = columns * (cell + gap) - gap;
    canvas.height = layers.length * (cell + gap) - gap;
    const most = Math.max(...layers.flat(), 1e-9);
    const style = getComputedStyle(this.root);
    const colours = ["--low", "--middle", "--high"].map((name) => style.getPropertyValue(name).split(",").map(Number));
    const context = canvas.getContext("2d");
    layers.forEach((heads, y) => heads.forEach((norm, x) => {
      context.fillStyle = colour(colours, norm / most);
      context.fillRect(x * (cell + gap), y * (cell + gap), cell, cell);
    }));
    let [layer, head] = [0, 0];
    layers.forEach((heads, y) => heads.forEach((norm, x) => {
      if (norm > layers[layer][head]) [layer, head] = [y, x];
    }));
    const read = tokens === null ? "" : ` after ${tokens} tokens`;
    this.words = `${layers.length} layers of ${columns} heads${read}; fullest: layer ${layer + 1}, head ${head + 1}`;
    canvas.setAttribute("aria-label", `The model's memory: ${this.words}, ${number(most)}`);
    $(".most", this.root).textContent = number(most);
    this.#say(this.words);
  }

  #say(words) {
    $(".words", this.root).textContent = words ?? "";
  }

  #point(event) {
    if (!this.layers) return;
    const { offsetX, offsetY } = event;
    const { clientWidth, clientHeight } = this.canvas;
    const heads = this.layers[Math.min(Math.floor((offsetY / clientHeight) * this.layers.length), this.layers.length - 1)];
    const head = Math.min(Math.floor((offsetX / clientWidth) * heads.length), heads.length - 1);
    this.#say(`layer ${this.layers.indexOf(heads) + 1}, head ${head + 1}: ${number(heads[head])}`);
  }
}

// A colour between three.
function colour(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * 2;
  const i = Math.min(Math.floor(at), 1);
  return `rgb(${colours[i].map((from, k) => Math.round(from + (colours[i + 1][k] - from) * (at - i))).join(" ")})`;
}
