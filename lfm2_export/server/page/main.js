// The page with the engine that it was built for: engine.js, which examples/web replaces by its own.
import { Engine } from './engine.js';
import { Page } from './chat.js';

await new Page(document, new Engine()).open();
