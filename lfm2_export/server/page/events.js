// Server-sent events of OpenAI's API.

// In: a ReadableStream of UTF-8 bytes, cut anywhere. Out: the JSON of each event, until "[DONE]" or the stream's end.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith('data: ')) continue;
        if (line === 'data: [DONE]') return;
        yield JSON.parse(line.slice('data: '.length));
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
