"""Chats with an artifact through onnxruntime-genai, which opens the folder as it is.

    pip install onnxruntime-genai
    python examples/genai_chat.py ARTIFACT "What is a list?" [--max-new-tokens 40]

In: the folder that `lfm2-export export` wrote; its genai_config.json names the graph. Out: the greedy answer, printed
token by token.
"""

from __future__ import annotations

import argparse
import json

import onnxruntime_genai as og


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()

    model = og.Model(options.artifact)
    tokenizer = og.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": options.prompt}])
    # The template writes <|startoftext|> itself; `encode` adds none.
    ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + options.max_new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    stream = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
