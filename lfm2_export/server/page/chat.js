// The conversation: what is typed goes to an engine, what comes back is shown as it comes.
import { Turn } from './turn.js';

const IDS = [
  ...['model', 'new', 'system', 'temperature', 'length', 'where', 'turns', 'fault', 'key', 'secret', 'ask', 'text'],
  ...['send', 'figures', 'memory'],
];

export class Page {
  #messages = [];
  #running = null; // the AbortController of the answer that is under way
  #first = null; // when its first piece came, in ms

  constructor(document, engine) {
    this.engine = engine;
    for (const id of IDS) this[id] = document.getElementById(id);
    this.main = document.querySelector('main');
    this.ask.addEventListener('submit', (event) => this.#submit(event));
    this.key.addEventListener('submit', (event) => this.#takeKey(event));
    this.text.addEventListener('keydown', (event) => this.#pressed(event));
    this.model.addEventListener('change', () => this.#told(() => this.#choose()));
    this.new.addEventListener('click', () => this.#clear());
  }

  // Asks for the models and makes the first one ready.
  async open() {
    await this.#told(async () => {
      const models = await this.engine.models();
      this.model.replaceChildren(...models.map(({ id, label }) => new Option(label, id)));
      await this.#choose();
    });
  }

  async #choose() {
    this.model.disabled = this.send.disabled = true;
    try {
      const told = (line) => (this.where.textContent = line);
      const { model, where } = await this.engine.prepare(this.model.value, told);
      this.model.value = model;
      told(where);
      this.send.disabled = false;
    } finally {
      this.model.disabled = false;
    }
    await this.#showMemory();
  }

  #pressed(event) {
    // isComposing: the Enter that ends a composition, as of Japanese, sends nothing.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.#running) this.ask.requestSubmit();
  }

  #submit(event) {
    event.preventDefault();
    if (this.#running) this.#running.abort();
    else if (this.text.value.trim() && !this.send.disabled) this.#told(() => this.#say(this.text.value));
  }

  async #say(text) {
    const asked = new Turn(this.turns, 'user');
    const answer = new Turn(this.turns, 'assistant');
    asked.add({ text });
    this.text.value = '';
    this.#begin(answer);
    try {
      const done = await this.#receive(answer, [...this.#messages, { role: 'user', content: text }]);
      this.#messages.push({ role: 'user', content: text }, { role: 'assistant', content: answer.text });
      this.#note(answer, done);
    } catch (error) {
      // What was typed can be sent again.
      asked.element.remove();
      answer.element.remove();
      this.text.value = this.text.value || text;
      throw error;
    } finally {
      this.#end(answer);
    }
    await this.#showMemory();
  }

  // Returns what the engine said at the end; null where the answer was stopped here.
  async #receive(answer, messages) {
    const { signal } = this.#running;
    const system = this.system.value.trim() ? [{ role: 'system', content: this.system.value }] : [];
    const request = { model: this.model.value, messages: [...system, ...messages], settings: this.#settings(), signal };
    try {
      for await (const piece of this.engine.reply(request)) {
        if (piece.done) return piece.done;
        this.#first ??= performance.now();
        this.#keepAtEnd(() => answer.add(piece));
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
    return null;
  }

  #begin(answer) {
    this.#running = new AbortController();
    this.#first = null;
    this.fault.hidden = true;
    this.send.textContent = 'Stop';
    this.model.disabled = this.new.disabled = true;
    this.figures.textContent = '';
    answer.running(true);
    this.main.scrollTop = this.main.scrollHeight;
  }

  #end(answer) {
    answer.running(false);
    this.#running = null;
    this.send.textContent = 'Send';
    this.model.disabled = this.new.disabled = false;
    this.text.focus();
  }

  #note(answer, done) {
    if (done === null) return this.#keepAtEnd(() => answer.note('Stopped.'));
    if (done.tokenIds) answer.element.dataset.tokenIds = done.tokenIds.join(' ');
    if (done.reason === 'length') this.#keepAtEnd(() => answer.note(`Cut after ${done.tokens} tokens.`));
    if (!answer.text) this.#keepAtEnd(() => answer.note('No text.'));
    const kept = done.keptTokens ? ` (${done.keptTokens} kept)` : '';
    const parts = [`${done.promptTokens} prompt tokens${kept} · ${done.tokens} new`];
    const seconds = (performance.now() - this.#first) / 1000;
    if (done.tokens > 1 && this.#first !== null) parts.push(`${((done.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    this.figures.textContent = parts.join(' · ');
  }

  async #showMemory() {
    this.memory.textContent = await this.engine.memory().catch(() => '');
  }

  #settings() {
    const number = (field) => (field.value.trim() === '' ? null : field.valueAsNumber);
    return { temperature: number(this.temperature), length: number(this.length) };
  }

  #clear() {
    this.#messages = [];
    this.turns.replaceChildren();
    this.fault.hidden = true;
    this.text.focus();
  }

  // Follows the text where its end is in sight, and stays where the reader has gone.
  #keepAtEnd(change) {
    const { scrollTop, scrollHeight, clientHeight } = this.main;
    const atEnd = scrollHeight - scrollTop - clientHeight < 40;
    change();
    if (atEnd) requestAnimationFrame(() => (this.main.scrollTop = this.main.scrollHeight));
  }

  // Runs an action; what goes wrong is a line on the page.
  async #told(action) {
    this.fault.hidden = true;
    try {
      await action();
    } catch (error) {
      this.fault.textContent = error.message;
      this.fault.hidden = !error.message;
      this.key.hidden = error.name !== 'NeedsKey';
      if (!this.key.hidden) this.secret.focus();
    }
  }

  #takeKey(event) {
    event.preventDefault();
    this.engine.useKey(this.secret.value);
    this.secret.value = '';
    this.key.hidden = true;
    this.open();
  }
}
