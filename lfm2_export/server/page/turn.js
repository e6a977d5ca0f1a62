// One message on the page: what was said, thought before it, and a note below.
import { rendered } from './text.js';

export class Turn {
  #text = '';
  #thought = '';
  #drawn = true;

  constructor(turns, role) {
    this.element = document.createElement('article');
    this.element.className = role;
    turns.append(this.element);
  }

  get text() {
    return this.#text;
  }

  add({ text = '', thought = '' }) {
    this.#text += text;
    this.#thought += thought;
    if (this.#drawn) requestAnimationFrame(() => this.draw());
    this.#drawn = false;
  }

  // As it is now; pieces that come between two frames are drawn at once.
  draw() {
    if (this.#drawn) return;
    this.#drawn = true;
    const parts = [];
    if (this.#thought) parts.push(this.#part('thought', [document.createTextNode(this.#thought)]));
    parts.push(this.#part('text', rendered(this.#text)));
    this.element.replaceChildren(...parts);
  }

  running(is) {
    this.draw();
    this.element.classList.toggle('running', is);
  }

  note(text) {
    this.draw();
    this.element.append(this.#part('note', [document.createTextNode(text)]));
  }

  #part(kind, children) {
    const element = document.createElement('div');
    element.className = kind;
    element.append(...children);
    return element;
  }
}
