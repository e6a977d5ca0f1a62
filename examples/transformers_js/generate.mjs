// Chats with an artifact through Transformers.js in Node, which opens the folder as it is.
//
//   ONNXRUNTIME_NODE_INSTALL=skip npm ci
//   node generate.mjs ARTIFACT "What is a list?" [dtype] [max_new_tokens]
//
// In: the folder that `lfm2-export export` wrote; dtype is fp32, fp16, q8, q4 or q4f16, by default the one that
// config.json names. Out: the greedy answer, printed token by token.
import path from 'node:path';
import { env, pipeline, TextStreamer } from '@huggingface/transformers';

const [folder, prompt, dtype, maxNewTokens = '40'] = process.argv.slice(2);
if (!folder || !prompt) {
  console.error('usage: node generate.mjs ARTIFACT PROMPT [dtype] [max_new_tokens]');
  process.exit(2);
}

// A folder of this machine, never a name on the Hub.
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));

const generator = await pipeline('text-generation', path.basename(path.resolve(folder)), { dtype: dtype || undefined });
const streamer = new TextStreamer(generator.tokenizer, { skip_prompt: true, skip_special_tokens: true });
await generator([{ role: 'user', content: prompt }], {
  max_new_tokens: Number(maxNewTokens),
  do_sample: false,
  streamer,
});
