// A model's text as elements. Only text nodes are made of it, never HTML, so that nothing in it can run or load.
//
// Known: blocks of code between lines of ```, `code` and **bold**. All else, Markdown's links and images among it, is
// shown as it was written.

export function rendered(text) {
  return blocks(text).map(({ code, content }) => {
    const element = document.createElement(code ? 'pre' : 'div');
    if (code) element.append(named('code', content));
    else element.append(...inline(content));
    return element;
  });
}

// A block of code that has not ended yet is one already: an answer is drawn while it comes.
function blocks(text) {
  const found = [];
  let code = false;
  for (const line of text.split('\n')) {
    if (/^\s*```[^`]*$/.test(line)) {
      code = !code;
      found.push({ code, lines: [] });
    } else {
      if (!found.length) found.push({ code, lines: [] });
      found.at(-1).lines.push(line);
    }
  }
  return found
    .map(({ code, lines }) => ({ code, content: code ? lines.join('\n') : trimmed(lines.join('\n')) }))
    .filter(({ code, content }) => code || content);
}

// Without the empty lines around it, which the distance between blocks stands for.
function trimmed(text) {
  return text.replace(/^\s*\n/, '').trimEnd();
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part) => {
    if (/^`[^`]+`$/.test(part)) return named('code', part.slice(1, -1));
    if (/^\*\*[^*]+\*\*$/.test(part)) return named('strong', part.slice(2, -2));
    return document.createTextNode(part);
  });
}

function named(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}
