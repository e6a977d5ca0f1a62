// Serves the built page and one artifact to browsers on this machine: node serve.mjs ARTIFACT [PORT] [PAGE]
//
// PORT 0: any that is free; PAGE: where the page was built, dist/ beside this file. Only files of the page are served,
// and those that the artifact's manifest lists; each URL is looked up in a table, so that no path can lead elsewhere.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const MANIFEST = 'lfm2_export.json';
const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.wasm': 'application/wasm',
  '.json': 'application/json',
};
// The isolation (opener and embedder) is what gives WebAssembly its threads.
const HEADERS = {
  'Content-Security-Policy':
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; " +
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-cache',
};

const [given, port = '8001', dist = fileURLToPath(new URL('dist', import.meta.url))] = process.argv.slice(2);
// npm changes the folder; a name is meant from where it was called.
const artifact = given && path.resolve(process.env.INIT_CWD ?? '.', given);
const files = table();

const server = http.createServer(answer);
server.on('error', ({ code }) => refuse(`port ${port} cannot be listened on (${code}); give another after DIR`));
server.listen(port, '127.0.0.1', () => {
  console.log(`http://127.0.0.1:${server.address().port}   ${artifact}   Ctrl-C: end`);
});

function table() {
  if (!given) refuse('no artifact; give the folder that lfm2-export export wrote: npm start -- DIR [PORT]');
  if (!fs.existsSync(path.join(dist, 'index.html'))) refuse('the page is not built; npm run build');
  const found = new Map([['/', path.join(dist, 'index.html')]]);
  for (const name of fs.readdirSync(dist, { recursive: true })) {
    const file = path.join(dist, name);
    if (fs.statSync(file).isFile()) found.set(`/${name.split(path.sep).join('/')}`, file);
  }
  for (const name of listed()) found.set(`/artifact/${encodeURI(name)}`, path.join(artifact, name));
  return found;
}

// The names in the manifest; a name that leaves the folder is refused.
function listed() {
  const { files = {}, programs = [] } = manifest();
  const names = [MANIFEST, ...Object.keys(files), ...programs.flatMap((program) => Object.keys(program.files ?? {}))];
  for (const name of names) {
    const leaves = path.isAbsolute(name) || name.split(/[\\/]/).includes('..');
    if (leaves) refuse(`${artifact}: ${JSON.stringify(name)} leaves the folder; export again`);
  }
  return names;
}

function manifest() {
  try {
    return JSON.parse(fs.readFileSync(path.join(artifact, MANIFEST), 'utf8'));
  } catch (error) {
    const reason = error.code === 'ENOENT' ? `has no ${MANIFEST}` : `${MANIFEST} cannot be read (${error.message})`;
    return refuse(`${artifact}: ${reason}; give a folder that lfm2-export export wrote`);
  }
}

function refuse(line) {
  console.error(`serve.mjs: ${line}`);
  process.exit(2);
}

function answer(request, response) {
  const end = (status) => response.writeHead(status, HEADERS).end();
  // A page of the web whose name was made to point here has another Host.
  if (!/^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(request.headers.host ?? '')) return end(403);
  if (request.method !== 'GET' && request.method !== 'HEAD') return end(405);
  const file = files.get(request.url.split('?')[0]);
  const size = file && fs.statSync(file, { throwIfNoEntry: false })?.size;
  if (size === undefined) return end(404);
  const [first, last] = range(request.headers.range, size);
  const partial = last - first + 1 < size;
  response.writeHead(partial ? 206 : 200, {
    ...HEADERS,
    'Content-Type': TYPES[path.extname(file)] ?? 'application/octet-stream',
    'Content-Length': last - first + 1,
    ...(partial && { 'Content-Range': `bytes ${first}-${last}/${size}` }),
  });
  if (request.method === 'HEAD' || !size) return response.end();
  const content = fs.createReadStream(file, { start: first, end: last });
  return content.on('error', () => response.destroy()).pipe(response);
}

// The first and the last byte; any range but one of the form a-b is answered with the whole.
function range(header, size) {
  const found = /^bytes=(\d+)-(\d+)$/.exec(header ?? '');
  if (!found || Number(found[1]) > Number(found[2]) || Number(found[1]) >= size) return [0, size - 1];
  return [Number(found[1]), Math.min(Number(found[2]), size - 1)];
}
