// Runs an encoder's artifact through Transformers.js' feature-extraction pipeline; prints one line of JSON.
//
//   node extract.mjs NODE_MODULES native|wasm < job.json
//
// job: {folder, dtype, texts}. Out: the pooled vectors of all texts in one batch (cls), their dims, and of the first
// text alone every output of the model.
import fs from 'node:fs';
import { open } from './library.mjs';

const [modules, where] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(0, 'utf8'));
const { transformers, name, options } = await open(modules, where, job.folder);

const extract = await transformers.pipeline('feature-extraction', name, { dtype: job.dtype, ...options });
const pooled = await extract(job.texts, { pooling: 'cls', normalize: true });
const outputs = await extract.model(extract.tokenizer(job.texts.slice(0, 1)));
const found = Object.entries(outputs).map(([key, value]) => [key, { dims: value.dims, data: Array.from(value.data) }]);
console.log(JSON.stringify({ pooled: pooled.tolist(), outputs: Object.fromEntries(found) }));
