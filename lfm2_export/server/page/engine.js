// Answers of the server that this page comes from, through /v1/chat/completions as any client of it.
//
// An engine has: models() -> [{id, label}]; prepare(model, told) -> {model, where}: which model is ready, and what it
// runs on, in words; reply(request) -> an async iterator of {text}, {thought} and, last, {done: {reason, tokens,
// promptTokens}}; memory() -> words. Each raises an Error with a line for the user; NeedsKey where a key is asked for.
import { events } from './events.js';

const KEY = 'lfm2-export-key';

export class NeedsKey extends Error {
  name = 'NeedsKey';
}

export class Engine {
  // Of this tab only, and gone with it.
  #key = sessionStorage.getItem(KEY) ?? '';

  useKey(key) {
    this.#key = key;
    sessionStorage.setItem(KEY, key);
  }

  async models() {
    const { data } = await (await this.#ask('v1/models')).json();
    const talking = data.filter((model) => model.kind !== 'encoder');
    if (!talking.length) throw new Error('No model of this server generates text; it has encoders only.');
    return talking.map((model) => ({ id: model.id, label: model.id }));
  }

  async prepare(model) {
    const { max_model_len: length } = await (await this.#ask(`v1/models/${encodeURI(model)}`)).json();
    return { model, where: `on the server, context of ${length.toLocaleString('en')} tokens` };
  }

  async *reply({ model, messages, settings, signal }) {
    const body = { model, messages, stream: true, stream_options: { include_usage: true } };
    if (settings.temperature !== null) body.temperature = settings.temperature;
    if (settings.length !== null) body.max_tokens = settings.length;
    const response = await this.#ask('v1/chat/completions', { method: 'POST', body: JSON.stringify(body), signal });
    const done = { reason: null, tokens: 0, promptTokens: 0, keptTokens: 0 };
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices;
      if (choice?.delta.reasoning_content) yield { thought: choice.delta.reasoning_content };
      if (choice?.delta.content) yield { text: choice.delta.content };
      done.reason = choice?.finish_reason ?? done.reason;
      if (chunk.usage) {
        done.tokens = chunk.usage.completion_tokens;
        done.promptTokens = chunk.usage.prompt_tokens;
        done.keptTokens = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
    }
    if (done.reason === null) throw new Error('The answer broke off: the server has ended.');
    yield { done };
  }

  async memory() {
    const text = await (await this.#ask('metrics')).text();
    const found = text.match(/^process_resident_memory_bytes (\S+)$/m);
    return found ? `${Math.round(Number(found[1]) / 1e6).toLocaleString('en')} MB on the server` : '';
  }

  async #ask(path, options = {}) {
    const headers = { 'Content-Type': 'application/json' };
    if (this.#key) headers.Authorization = `Bearer ${this.#key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new Error('The server does not answer; is it still running?');
    }
    if (response.status === 401) throw new NeedsKey(this.#key ? 'The server has another API key.' : '');
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `The server answers ${response.status} to ${path}.`);
  }
}
