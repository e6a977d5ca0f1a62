// Opens Transformers.js for a folder: open(NODE_MODULES, native|webgpu|wasm, FOLDER).
//
// native: onnxruntime-node reads the folder, as any Node program does. webgpu: the same on a GPU. wasm: the build for
// browsers on onnxruntime-web, files fetched over HTTP from a server in this process, nothing read from the disk by
// Transformers.js itself. Returns the library, the name by which it knows the folder, and options for its models.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

export async function open(modules, where, folder) {
  const library = (file) => import(pathToFileURL(path.join(modules, file)).href);
  return where === 'wasm' ? browser(library, modules, folder) : native(library, where, folder);
}

async function native(library, where, folder) {
  const transformers = await library('@huggingface/transformers/dist/transformers.node.mjs');
  transformers.env.allowRemoteModels = false;
  transformers.env.localModelPath = path.dirname(folder);
  return { transformers, name: path.basename(folder), options: where === 'webgpu' ? { device: 'webgpu' } : {} };
}

async function browser(library, modules, folder) {
  const port = await serve(folder);
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
