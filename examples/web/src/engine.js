// Answers computed in this browser: a worker runs Transformers.js on the files of the artifact that serve.mjs serves.
//
// The same interface as lfm2_export/server/page/engine.js.
import { threads, webgpu } from './devices.js';
import { programs } from './artifact.js';

export class Engine {
  #worker = null;
  #webgpu = null;
  #models = [];

  async models() {
    this.#webgpu = await webgpu();
    this.#models = await programs(this.#webgpu);
    return this.#models;
  }

  // Where WebGPU cannot run a program, the best one on wasm is taken, and the line says so.
  async prepare(model, told) {
    try {
      return { model, where: await this.#load(JSON.parse(model), told) };
    } catch (error) {
      const instead = this.#models.find(({ id }) => JSON.parse(id).device === 'wasm');
      if (JSON.parse(model).device === 'wasm' || !instead) throw error;
      const where = await this.#load(JSON.parse(instead.id), told);
      return { model: instead.id, where: `${where}; WebGPU failed: ${reason(error)}` };
    }
  }

  async #load(program, told) {
    this.#worker?.terminate();
    this.#worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    for await (const { line } of this.#asked({ load: { ...program, threads: threads() } })) {
      if (line) told(line);
    }
    if (program.device === 'webgpu') return `in this browser on WebGPU (${this.#webgpu.name})`;
    const count = threads() === 1 ? '1 thread' : `${threads()} threads`;
    return `in this browser on wasm, ${count}${this.#webgpu.usable ? '' : `; ${this.#webgpu.why}`}`;
  }

  async *reply({ messages, settings, signal }) {
    const worker = this.#worker;
    const stop = () => worker.postMessage({ stop: true });
    signal.addEventListener('abort', stop);
    try {
      for await (const piece of this.#asked({ reply: { messages, settings } })) {
        if (piece.text || piece.done) yield piece;
      }
    } finally {
      signal.removeEventListener('abort', stop);
    }
  }

  // What the worker answers to a message, until it says that this is the end.
  async *#asked(message) {
    const worker = this.#worker;
    const waiting = [];
    let wake = () => {};
    const take = (answer) => {
      waiting.push(answer);
      wake();
    };
    worker.onmessage = ({ data }) => take(data);
    worker.onerror = (event) => take({ fault: event.message || 'the worker could not be started' });
    worker.postMessage(message);
    for (;;) {
      while (!waiting.length) await new Promise((done) => (wake = done));
      const answer = waiting.shift();
      if (answer.fault) throw new Error(answer.fault);
      yield answer;
      if (answer.end) return;
    }
  }

  // Of the page and its worker, as the browser counts; not of the GPU. Chromium tells it to isolated pages alone.
  async memory() {
    if (!performance.measureUserAgentSpecificMemory) return 'memory: not told by this browser';
    const { bytes } = await performance.measureUserAgentSpecificMemory();
    return `${Math.round(bytes / 1e6).toLocaleString('en')} MB in this page`;
  }
}

// The last part of ONNX Runtime's message, which says what is missing.
function reason(error) {
  const line = error.message.split('\n')[0];
  return line.split(/ERROR_MESSAGE: |Status Message: /).at(-1).slice(0, 160);
}
