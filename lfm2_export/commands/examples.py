"""What the help of each verb shows: command lines without the program's name, which a test parses."""

from __future__ import annotations

from collections.abc import Mapping

FIRST_STEPS = (
    "export LiquidAI/LFM2-1.2B --output lfm2-1.2b",
    'run lfm2-1.2b "What is C. elegans?"',
    "chat lfm2-1.2b",
)
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "export": (
        "export LiquidAI/LFM2-1.2B --output lfm2-1.2b",
        "export LiquidAI/LFM2-1.2B -s q8,fp16 -o lfm2-1.2b",
        "export LiquidAI/LFM2-1.2B --backend onnx,executorch -o lfm2-1.2b",
        "export LFM2-1.2B-Q4_0.gguf -o lfm2-1.2b",
        "export LiquidAI/LFM2-1.2B --lora my-adapter -o my-model",
    ),
    "run": (
        'run lfm2-1.2b "What is C. elegans?"',
        'run lfm2-1.2b -n 64 --temperature 0.3 --min-p 0.15 -p "What is C. elegans?"',
        "run lfm2-1.2b --json < question.txt",
        'run my-org/lfm2-1.2b-q4 "What is C. elegans?"',
    ),
    "chat": ("chat lfm2-1.2b", 'chat lfm2-1.2b --system "Answer in French." --temperature 0.3'),
    "embed": ('embed embedding --text "what is C. elegans?" --query', "embed embedding --json < lines.txt"),
    "serve": ("serve lfm2-1.2b", "serve lfm2-1.2b embedding --port 8080 --api-key secret"),
    "parity": (
        "parity lfm2-1.2b LiquidAI/LFM2-1.2B",
        "parity lfm2-1.2b LiquidAI/LFM2-1.2B -s q4 --record --report parity.html",
    ),
    "quality": ("quality lfm2-1.2b LFM2-1.2B-Q4_K_M.gguf --checkpoint LiquidAI/LFM2-1.2B --text held-out.txt",),
    "sweep": ("sweep fleet.yaml --dry-run", "sweep fleet.yaml", "sweep fleet.yaml --address auto --json"),
    "bench": ("bench lfm2-1.2b", "bench lfm2-1.2b -p 512 -n 128 -t 4 --profile"),
    "adopt": ("adopt lfm2-1.2b",),
    "push": ("push lfm2-1.2b my-org/lfm2-1.2b-q4 --dry-run", "push lfm2-1.2b my-org/lfm2-1.2b-q4 --private"),
    "inspect": ("inspect lfm2-1.2b", "inspect LiquidAI/LFM2-1.2B --json"),
    "support": ("support",),
    "demo": ("demo", "demo --checkpoint tiny-dense"),
    "completion": ("completion bash > ~/.local/share/bash-completion/completions/lfm2-export",),
}
