// Transformers.js in a worker, so that the page answers while a token is computed.
//
// In, one at a time: {load: {dtype, device, threads}}, {reply: {messages, settings}}, and {stop} between. Out: {line},
// {text}, {done}, and for each of the two {end} or {fault}.
import {
  AutoModelForCausalLM,
  AutoTokenizer,
  env,
  InterruptableStoppingCriteria,
  TextStreamer,
} from '@huggingface/transformers';
import plainMjs from 'onnxruntime-web/ort-wasm-simd-threaded.mjs?url';
import plainWasm from 'onnxruntime-web/ort-wasm-simd-threaded.wasm?url';
import webgpuMjs from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.mjs?url';
import webgpuWasm from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url';

const NAME = 'artifact';
const here = new URL('../', self.location.href);
// ONNX Runtime's build with WebGPU (which is what Transformers.js takes by itself) lacks CPU kernels that q4 and q8
// programs need, GatherBlockQuantized among them; the plain build has them, and is half the size.
const RUNTIMES = { wasm: { mjs: plainMjs, wasm: plainWasm }, webgpu: { mjs: webgpuMjs, wasm: webgpuWasm } };

// "Remote" is the server of this page; the Hub is never asked. It is near, and the artifact may change: no cache.
env.allowLocalModels = false;
env.remoteHost = here.href;
env.remotePathTemplate = '{model}/';
env.useBrowserCache = env.useWasmCache = false;

const stopped = new InterruptableStoppingCriteria();
let tokenizer, model;

self.onmessage = async ({ data }) => {
  if (data.stop) return stopped.interrupt();
  try {
    if (data.load) await load(data.load);
    if (data.reply) await reply(data.reply);
    self.postMessage({ end: true });
  } catch (error) {
    self.postMessage({ fault: String(error?.message ?? error) });
  }
};

async function load({ dtype, device, threads }) {
  const { mjs, wasm } = RUNTIMES[device];
  env.backends.onnx.wasm.wasmPaths = { mjs: new URL(mjs, here).href, wasm: new URL(wasm, here).href };
  env.backends.onnx.wasm.numThreads = threads;
  self.postMessage({ line: 'loading…' });
  tokenizer = await AutoTokenizer.from_pretrained(NAME);
  model = await AutoModelForCausalLM.from_pretrained(NAME, { dtype, device, progress_callback: progress });
  // What a device cannot run, some of it says only when it runs; and a GPU's programs are compiled here.
  self.postMessage({ line: 'trying a token…' });
  await model.generate({ ...prompted([{ role: 'user', content: 'Hello' }]), max_new_tokens: 1 });
}

function progress({ status, file, loaded, total }) {
  if (status !== 'progress' || !file.startsWith('onnx/')) return;
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  self.postMessage({ line: `loading ${file}: ${megabytes(loaded)} of ${megabytes(total)} MB` });
}

async function reply({ messages, settings }) {
  const inputs = prompted(messages);
  const promptTokens = inputs.input_ids.dims.at(-1);
  const tokenIds = [];
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => text && self.postMessage({ text }),
    token_callback_function: (tokens) => tokenIds.push(...tokens.map(Number)),
  });
  stopped.reset();
  await model.generate({ ...inputs, ...sampling(settings), streamer, stopping_criteria: stopped });
  const reason = settings.length !== null && tokenIds.length >= settings.length ? 'length' : 'stop';
  self.postMessage({ done: { reason, tokens: tokenIds.length, promptTokens, tokenIds } });
}

function prompted(messages) {
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
}

// What is left out is the checkpoint's own.
function sampling({ temperature, length }) {
  const asked = length === null ? {} : { max_new_tokens: length };
  if (temperature === null) return asked;
  return temperature > 0 ? { ...asked, do_sample: true, temperature } : { ...asked, do_sample: false };
}
