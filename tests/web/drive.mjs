// Drives Chromium: node drive.mjs NODE_MODULES CHROMIUM < job.json > result.json
//
// In: {"arguments": [...], "visits": [{"url", "width", "height", "dark", "before", "steps": [[action, ...], ...]}]};
// "before" is a script that runs before the page's own. Out: for each visit the values of its steps, and what the page
// asked for and logged, and its errors.
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { text as all } from 'node:stream/consumers';

const [modules, executablePath] = process.argv.slice(2);
const { chromium } = await import(pathToFileURL(path.join(path.resolve(modules), 'playwright-core/index.mjs')).href);

const ACTIONS = {
  fill: (page, selector, value) => page.fill(selector, value),
  press: (page, selector, key) => page.press(selector, key),
  click: (page, selector) => page.click(selector),
  select: (page, selector, value) => page.selectOption(selector, value),
  wait: (page, selector) => page.waitForSelector(selector, { timeout: 90_000, state: 'attached' }).then(() => null),
  text: (page, selector) => page.locator(selector).allInnerTexts(),
  attribute: (page, selector, name) => page.getAttribute(selector, name),
  value: (page, selector) => page.inputValue(selector),
  screenshot: (page, file) => page.screenshot({ path: file }).then(() => null),
  script: (page, source) => page.evaluate(source),
};

const job = JSON.parse(await all(process.stdin));
// Root has no sandbox, and Chromium's own pages are not what is tested.
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', ...(job.arguments ?? [])] });
const visits = [];
for (const visit of job.visits) visits.push(await visited(visit));
await browser.close();
console.log(JSON.stringify(visits));

async function visited({ url, width = 1280, height = 800, dark = false, before = '', steps }) {
  const options = { viewport: { width, height }, colorScheme: dark ? 'dark' : 'light', deviceScaleFactor: 1 };
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const found = { values: [], requests: [], log: [], errors: [] };
  page.on('request', (request) => found.requests.push(request.url()));
  page.on('console', (message) => found.log.push(message.text()));
  page.on('pageerror', (error) => found.errors.push(String(error)));
  await page.addInitScript(before);
  await page.goto(url);
  for (const [action, ...values] of steps) {
    try {
      found.values.push(await ACTIONS[action](page, ...values));
    } catch (error) {
      found.errors.push(`${action} ${values}: ${error}`);
      found.log.push(await page.innerText('body'));
      break;
    }
  }
  await context.close();
  return found;
}
