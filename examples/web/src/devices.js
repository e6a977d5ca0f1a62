// What this browser can compute on.

// {usable: true, name, float16} or {usable: false, why}.
export async function webgpu() {
  const without = (why) => ({ usable: false, why });
  if (!navigator.gpu) return without('this browser has no WebGPU');
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' }).catch(() => null);
  if (!adapter) return without('WebGPU finds no GPU here');
  const { vendor, architecture, description } = adapter.info ?? {};
  const name = description || [vendor, architecture].filter(Boolean).join(' ') || 'a GPU without a name';
  return { usable: true, name, float16: adapter.features.has('shader-f16') };
}

// WebAssembly has threads only where the page is isolated, which serve.mjs's headers make it.
export function threads() {
  return crossOriginIsolated ? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2)) : 1;
}
