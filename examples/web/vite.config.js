// Builds the page of `lfm2-export serve` (lfm2_export/server/page) with another engine: the browser itself.
import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vite';

const at = (path) => fileURLToPath(new URL(path, import.meta.url));

export default defineConfig({
  root: at('../../lfm2_export/server/page'),
  base: './',
  publicDir: false,
  cacheDir: at('node_modules/.vite'),
  resolve: {
    alias: [{ find: /^\.\/engine\.js$/, replacement: at('src/engine.js') }],
    // ONNX Runtime's WebAssembly is a file beside the script, not fetched from elsewhere.
    conditions: ['onnxruntime-web-use-extern-wasm', 'module', 'browser', 'import', 'default'],
  },
  build: {
    outDir: at('dist'),
    emptyOutDir: true,
    target: 'esnext',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0, // inline data would want a laxer Content-Security-Policy
    reportCompressedSize: false,
  },
  worker: { format: 'es' },
});
