// The artifact that is served at artifact/: which of its programs this browser can open.

const FOLDER = 'artifact';
const FLOAT16 = ['fp16', 'q4f16'];

// In: whether WebGPU is there, and does float16. Out: [{id, label}], the one that suits this browser best first.
export async function programs({ usable, float16 }) {
  const [manifest, config] = await Promise.all([read('lfm2_export.json'), read('config.json')]);
  const schemes = manifest.programs
    .filter(({ backend, kind }) => backend === 'onnx' && kind === 'decoder')
    .map(({ scheme }) => scheme);
  if (!schemes.length) throw new Error('No ONNX program here generates text; export one with --scheme q4.');
  const preferred = config['transformers.js_config'] ?? {};
  const onGpu = usable ? schemes.filter((scheme) => float16 || !FLOAT16.includes(scheme)) : [];
  const on = (device, dtypes) => dtypes.map((dtype) => ({ dtype, device }));
  const found = [
    ...on('webgpu', first(onGpu, preferred.device_config?.webgpu?.dtype, preferred.dtype)),
    ...on('wasm', first(schemes, preferred.dtype)),
  ];
  return found.map((program) => ({ id: JSON.stringify(program), label: label(manifest.checkpoint, program) }));
}

// The scheme that config.json prefers, before the others: the first of `wanted` that is there.
function first(schemes, ...wanted) {
  const best = wanted.find((one) => schemes.includes(one));
  return [...schemes].sort((a, b) => (b === best) - (a === best));
}

function label(checkpoint, { dtype, device }) {
  return `${checkpoint.name.split('/').at(-1)} ${dtype} · ${device === 'webgpu' ? 'WebGPU' : 'wasm'}`;
}

async function read(name) {
  const response = await fetch(`${FOLDER}/${name}`).catch(() => null);
  if (response === null) throw new Error('The server of this page does not answer; is it still running?');
  if (response.status === 404) {
    throw new Error(`No artifact: ${name} is not there. Start with: npm start -- DIR (lfm2-export's output).`);
  }
  if (!response.ok) throw new Error(`The server answers ${response.status} to ${FOLDER}/${name}.`);
  return response.json();
}
