"""The ONNX backend: contrib operators of ONNX Runtime, one folder for onnxruntime, onnxruntime-genai and
Transformers.js.

Exporting imports torch and onnx, running only onnxruntime; each on first use, and never before this module has turned
onnxruntime's telemetry off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfm2_export.backends import ExportOption, tested_with
from lfm2_export.heads import SENTENCE, TOKENS
from lfm2_export.manifest import DECODER, DRAFTER
from lfm2_export.messages import one_line

if TYPE_CHECKING:
    import numpy as np

    from lfm2_export.artifact_writer import ArtifactWriter
    from lfm2_export.backends import FullPrecision
    from lfm2_export.backends.base import RunnerOptions
    from lfm2_export.backends.onnx.drafter import OnnxDrafter
    from lfm2_export.backends.onnx.encoder import OnnxEncoder
    from lfm2_export.backends.onnx.runner import OnnxRunner
    from lfm2_export.backends.onnx.stored import StoredWeights
    from lfm2_export.backends.profile import Profile
    from lfm2_export.backends.program import Estimate, ExportedProgram, ExportRequest
    from lfm2_export.backends.weights.plan import WeightPlan
    from lfm2_export.checkpoint import Checkpoint
    from lfm2_export.config import ModelConfig
    from lfm2_export.manifest import Program
    from lfm2_export.quant.schemes import Scheme

# Transformers.js looks for these names.
SCHEMES = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "q8": "model_quantized.onnx",
    "q4": "model_q4.onnx",
    "q4f16": "model_q4f16.onnx",
}
DEFAULT_SCHEME = "q4"
# Those of the CPU; one of float16 there only converts back and forth.
DRAFTER_SCHEMES = ("fp32", "q8", "q4")
OPTIONS: dict[str, ExportOption] = {}
TESTED_WITH = {
    "fp32": "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    "fp16": "lfm2-export, onnxruntime, Transformers.js (Node)",
    "q8": "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    "q4": "lfm2-export, onnxruntime, onnxruntime-genai, Transformers.js (Node)",
    "q4f16": "lfm2-export, onnxruntime, Transformers.js (Node)",
    # Transformers.js 4.3 knows no lfm3, and onnxruntime-genai takes it for its lfm2.
    "lfm3 fp32": "lfm2-export, onnxruntime, onnxruntime-genai",
    **dict.fromkeys(("lfm3 q8", "lfm3 q4"), "lfm2-export, onnxruntime-genai"),
    **dict.fromkeys(("lfm3 fp16", "lfm3 q4f16"), "lfm2-export"),
    **{f"lfm2_bidirectional {scheme}": "lfm2-export, onnxruntime, Transformers.js (Node)" for scheme in SCHEMES},
    "lfm2_bidirectional fp32": "lfm2-export, onnxruntime, sentence-transformers, Transformers.js (Node)",
}
KL_TOLERANCE = 1e-3
_TELEMETRY = "ORT_DISABLE_TELEMETRY"


def _turn_telemetry_off() -> None:
    """From its import on, onnxruntime's wheel keeps a device's id and queued events (paths, names, error texts) in the
    user's cache, for a collector of its maker. A user who has set the variable, to whatever, has decided."""
    if _TELEMETRY in os.environ:
        return
    os.environ[_TELEMETRY] = "1"
    # The variable is too late for one that the user has imported: it has made its files, but writes no more events.
    if (imported := sys.modules.get("onnxruntime")) is not None:
        imported.disable_telemetry_events()


_turn_telemetry_off()

_HOW_TO_RUN = """## Run it

In this folder; on the Hub the repository's id stands where the dot is:

```sh
pip install lfm2-export
lfm2-export run . --prompt "What is C. elegans?"
```

Graphs named `*_lfm2*.onnx` are for lfm2-export's own operators, which it builds where it finds a compiler; they are
faster and read the same data files. All others need ONNX Runtime alone.
"""

_GENAI = "onnxruntime-genai"
_HOW_TO_GENAI = """
onnxruntime-genai (`pip install onnxruntime-genai`) opens the folder as it is:

```python
import json

import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
messages = json.dumps([{"role": "user", "content": "What is C. elegans?"}])
ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + 128)
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(ids) :]))
```
"""

_TRANSFORMERS_JS = "Transformers.js"
_HOW_TO_TRANSFORMERS_JS = """
Transformers.js (`npm install @huggingface/transformers`) does, too. In Node, in this folder (a page gives the
repository's id to `pipeline`, without the two lines about `env`):

```js
import path from "node:path";
import {{ env, pipeline }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = path.dirname(process.cwd());
const generator = await pipeline("text-generation", path.basename(process.cwd()), {{ dtype: "{dtype}" }});
const [reply] = await generator([{{ role: "user", content: "What is C. elegans?" }}], {{ max_new_tokens: 128 }});
console.log(reply.generated_text.at(-1).content);
```
"""


_HOW_TO_DRAFT = """## Run it

Beside the artifact of its model (`{target}`), whose decoding it makes faster and changes in nothing:

```
pip install lfm2-export
lfm2-export run MODEL --speculate . --prompt "What is C. elegans?"
```
"""


_HOW_TO_EMBED = """## Run it

In this folder; on the Hub the repository's id stands where the dot is:

```sh
pip install lfm2-export
{command}
```

Inputs of the graphs: `input_ids` and `attention_mask`, int64 [batch, tokens], padded on either side; outputs, float32:
{outputs}.{more} Transformers.js opens the folder as it is:

```js
import path from "node:path";
import {{ env, pipeline }} from "@huggingface/transformers";

env.allowRemoteModels = false;
env.localModelPath = path.dirname(process.cwd());
const extract = await pipeline("feature-extraction", path.basename(process.cwd()), {{ dtype: "{dtype}" }});
console.log((await extract("What is C. elegans?")).dims);
```
"""
_EMBED = 'lfm2-export embed . --text "What is C. elegans?" --query'
_LOAD = "python -c 'import lfm2_export; print(lfm2_export.load_encoder(\".\").run([[1, 2, 3]]))'"
_POOLED = ' `lfm2_export.sentence_transformers.load(".")` is a model of sentence-transformers.'
_OTHERS = (_GENAI, _TRANSFORMERS_JS)
_BY_TOKEN = " Vectors of tokens are compared by `lfm2_export.max_sim`, as by PyLate."


def how_to_run(programs: Sequence[Program], family: str) -> str:
    """The card's section on onnxruntime, and on onnxruntime-genai and Transformers.js where they open a program."""
    first = programs[0]
    if first.kind == DRAFTER:
        target = one_line(first.options["drafter"]["target_name"])
        return _HOW_TO_DRAFT.format(target=target.replace("`", "'"))
    if first.kind == DECODER:
        return _HOW_TO_RUN + _with_other_runtimes(programs, family)
    dtype = one_line(first.scheme).replace('"', "'")
    names = [output.name for output in first.outputs]
    return _HOW_TO_EMBED.format(
        dtype=dtype,
        command=_EMBED if {SENTENCE, TOKENS} & set(names) else _LOAD,
        outputs=", ".join(f"`{one_line(name).replace('`', chr(39))}`" for name in names),
        more=_POOLED if SENTENCE in names else _BY_TOKEN if TOKENS in names else "",
    )


def _with_other_runtimes(programs: Sequence[Program], family: str) -> str:
    opened_by = {name: [p for p in programs if name in tested_with(TESTED_WITH, family, p.scheme)] for name in _OTHERS}
    parts = [_HOW_TO_GENAI] if opened_by[_GENAI] else []
    if opened := opened_by[_TRANSFORMERS_JS]:
        parts.append(_HOW_TO_TRANSFORMERS_JS.format(dtype=opened[0].scheme))
    return "".join(parts)


def make_plan(config: ModelConfig, scheme: Scheme, options: Mapping[str, int | str]) -> WeightPlan:
    """How every weight of a checkpoint is stored under a scheme."""
    from lfm2_export.backends.onnx import plan

    return plan.make_plan(config, scheme)


def estimate(request: ExportRequest) -> Estimate:
    """Disk and memory that an export will need; refuses what does not fit the operators."""
    from lfm2_export.backends.onnx import export

    return export.estimate(request)


def export_program(request: ExportRequest) -> ExportedProgram:
    """Writes one program's graphs and data files."""
    from lfm2_export.backends.onnx import export

    return export.export_program(request)


def runtime_files(checkpoint: Checkpoint, writer: ArtifactWriter) -> None:
    """Writes genai_config.json and config.json for the programs that the artifact will hold."""
    from lfm2_export.backends.onnx import runtimes

    runtimes.write(checkpoint, writer)


def load_runner(folder: Path, program: Program, options: RunnerOptions | None = None) -> OnnxRunner:
    """A runner on the graph that is fastest here, or the one that ``options`` ask for."""
    from lfm2_export.backends.onnx.runner import OnnxRunner

    return OnnxRunner.from_program(folder, program, options)


def load_encoder(folder: Path, program: Program, options: RunnerOptions | None = None) -> OnnxEncoder:
    """A runner on an encoder's graph."""
    from lfm2_export.backends.onnx.encoder import OnnxEncoder

    return OnnxEncoder(folder, program, options)


def load_drafter(folder: Path, program: Program, options: RunnerOptions | None = None) -> OnnxDrafter:
    """A runner on a drafter's graph, the one with our products where they can be had."""
    from lfm2_export.backends.onnx.drafter import OnnxDrafter

    return OnnxDrafter(folder, program, options)


def runnable_graphs(program: Program) -> dict[str, Program]:
    """Every graph that runs here, by its file; those that score every position apart."""
    from lfm2_export.backends.onnx import variants

    return variants.runnable(program)


def profile_program(
    folder: Path, program: Program, prompt: Sequence[int], options: RunnerOptions | None = None
) -> Profile:
    """A prefill and a decode step by operator, from onnxruntime's profiler."""
    from lfm2_export.backends.onnx import profile

    return profile.profile_program(folder, program, prompt, options)


def stored_weights(folder: Path, program: Program, config: ModelConfig) -> StoredWeights:
    """The weights that the program's nodes read, dequantized."""
    from lfm2_export.backends.onnx import stored

    return stored.open_stored(folder, program, config)


def score_at_full_precision(
    folder: Path, program: Program, rows: Sequence[np.ndarray], *, threads: int | None = None
) -> FullPrecision | None:
    """The program's logits at accuracy level 0."""
    from lfm2_export.backends.onnx import precision

    return precision.score(folder, program, rows, threads=threads)
