"""Trains checkpoints of another seed and other shapes than the bundled ones, so that nothing is tuned to those two.

    python -m benchmarks.another_checkpoint moe --output build/checkpoints/moe
    python -m benchmarks.another_checkpoint dense --output build/checkpoints/dense
    python -m benchmarks.another_checkpoint wide --device cuda --output build/checkpoints/wide

In: the text that the bundled checkpoints are trained on (examples/train_bundled.py). Out: a checkpoint's folder, the
same on every run of one machine; from ten minutes to an hour of one core, or half a minute of a GPU (an H200).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
SEED, STEPS = 11, 600

# Widths at which llama.cpp's K-quants need no fallback, another depth, another order of layers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "moe": (
        "tiny-moe",
        {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
            "num_dense_layers": 1,
            "intermediate_size": 768,
            "moe_intermediate_size": 256,
            "num_experts": 6,
        },
    ),
    "dense": ("tiny-dense", {"num_hidden_layers": 8, "full_attn_idxs": [1, 4, 6], "block_ff_dim": 768}),
    # 26 million weights, and linears of twice the others' width; for a GPU.
    "wide": (
        "tiny-dense",
        {
            "num_hidden_layers": 8,
            "full_attn_idxs": [2, 5],
            "block_dim": 512,
            "conv_dim": 512,
            "conv_dim_out": 512,
            "hidden_size": 512,
            "block_ff_dim": 2304,
        },
    ),
}


def train(shape: str, output: Path, *, seed: int = SEED, steps: int = STEPS, device: str = "cpu") -> None:
    """Trains one into a folder that does not exist yet."""
    sys.path.insert(0, str(EXAMPLES))
    import train_bundled  # type: ignore[import-not-found]

    base, changes = SHAPES[shape]
    train_bundled.SEED = seed
    train_bundled.CONFIGS[base] |= changes
    train_bundled.main([base, "--output", str(output), "--steps", str(steps), "--device", device])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    train(options.shape, options.output, seed=options.seed, steps=options.steps, device=options.device)


if __name__ == "__main__":
    main()
