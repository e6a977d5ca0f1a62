// Runs an artifact through Transformers.js and prints what it gives as one line of JSON.
//
//   node transformers.mjs NODE_MODULES native|webgpu|wasm < job.json
//
// job: {folder, dtype (null: the default), prompts: token ids, steps, messages, texts}.
import fs from 'node:fs';
import { open } from './library.mjs';

const [modules, where] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(0, 'utf8'));
const { transformers, name, options } = await open(modules, where, job.folder);
const { AutoModelForCausalLM, AutoTokenizer, Tensor, TextGenerationPipeline } = transformers;

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
