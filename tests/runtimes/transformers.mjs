// Runs an artifact through Transformers.js and prints what it gives as one line of JSON.
//
//   node transformers.mjs NODE_MODULES native|webgpu|wasm < job.json
//
// native: onnxruntime-node reads the folder, as any Node program does. webgpu: the same on a GPU. wasm: the build for
// browsers on onnxruntime-web, files fetched over HTTP from a server in this process, nothing read from the disk by
// Transformers.js itself.
// job: {folder, dtype (null: the default), prompts: token ids, steps, messages, texts}.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, where] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(0, 'utf8'));
const library = (file) => import(pathToFileURL(path.join(modules, file)).href);
const { transformers, name, options } = where === 'wasm' ? await browser() : await native();
const { AutoModelForCausalLM, AutoTokenizer, Tensor, TextGenerationPipeline } = transformers;

async function native() {
  const transformers = await library('@huggingface/transformers/dist/transformers.node.mjs');
  transformers.env.allowRemoteModels = false;
  transformers.env.localModelPath = path.dirname(job.folder);
  return { transformers, name: path.basename(job.folder), options: where === 'webgpu' ? { device: 'webgpu' } : {} };
}

async function browser() {
  const port = await serve(job.folder);
  // Transformers.js takes the backend for browsers where it does not find itself in Node.
  Object.defineProperty(process, 'release', { value: { ...process.release, name: 'browser' } });
  const transformers = await library('@huggingface/transformers/dist/transformers.web.js');
  const { env } = transformers;
  const wasm = (file) => pathToFileURL(path.join(modules, 'onnxruntime-web/dist', file)).href;
  env.backends.onnx.wasm.wasmPaths = {
    mjs: wasm('ort-wasm-simd-threaded.mjs'),
    wasm: wasm('ort-wasm-simd-threaded.wasm'),
  };
  env.backends.onnx.wasm.numThreads = 1;
  env.useWasmCache = env.useBrowserCache = env.allowLocalModels = false;
  env.remoteHost = `http://127.0.0.1:${port}/`;
  env.remotePathTemplate = '{model}/';
  return { transformers, name: 'artifact', options: { device: 'wasm' } };
}

async function serve(folder) {
  const server = http.createServer((request, response) => {
    const file = path.join(folder, path.normalize(new URL(request.url, 'http://x').pathname.replace(/^\/artifact\//, '')));
    if (!fs.existsSync(file)) return response.writeHead(404).end();
    // A connection kept open would time out while the model computes in this same thread.
    response.writeHead(200, { 'content-length': fs.statSync(file).size, connection: 'close' });
    return request.method === 'HEAD' ? response.end() : fs.createReadStream(file).pipe(response);
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  server.unref(); // it alone need not keep this process alive
  return server.address().port;
}

const row = (ids) => new Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
const numbers = (tensor) => Array.from(tensor.data, Number);

const model = await AutoModelForCausalLM.from_pretrained(name, { dtype: job.dtype ?? undefined, ...options });
// eos_token_id -1: only the number of tokens ends a text.
const settings = { max_new_tokens: job.steps, min_new_tokens: job.steps, eos_token_id: -1, do_sample: false };
const tokens = [];
for (const ids of job.prompts) {
  const mask = row(ids.map(() => 1));
  tokens.push(numbers(await model.generate({ inputs: row(ids), attention_mask: mask, ...settings })).slice(ids.length));
}

const tokenizer = await AutoTokenizer.from_pretrained(name);
const encoded = job.texts.map((text) => tokenizer.encode(text));
const chat = { add_generation_prompt: true };
const rendered = tokenizer.apply_chat_template(job.messages, { ...chat, tokenize: false });
const chatIds = tokenizer.apply_chat_template(job.messages, { ...chat, return_tensor: false }).input_ids;

const generate = new TextGenerationPipeline({ task: 'text-generation', model, tokenizer });
const text = (results) => results.map((result) => (result[0] ?? result).generated_text);
const alone = [];
for (const prompt of job.texts) alone.push(...text(await generate(prompt, { ...settings, max_new_tokens: 8 })));
const together = text(await generate(job.texts, { ...settings, max_new_tokens: 8 }));
const reply = text([await generate(job.messages, { ...settings, max_new_tokens: 8 })])[0].at(-1);

console.log(JSON.stringify({ tokens, encoded, rendered, chatIds, alone, together, reply }));
