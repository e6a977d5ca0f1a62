"""What cannot be lowered is refused by name before any work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("executorch")

from lfm2_export.backends.executorch import export
from lfm2_export.errors import Lfm2ExportError
from tests.backends.executorch.programs import checkpoint_of, request


def refusal(model_type: str, scheme: str, *, overrides: dict | None = None, **options: object) -> str:
    with pytest.raises(Lfm2ExportError) as error:
        export.estimate(request(checkpoint_of(model_type, **(overrides or {})), scheme, **options))
    return str(error.value)


def test_stock_operator_always_normalizes() -> None:
    assert "norm_topk_prob=false" in refusal("lfm2_moe", "8da4w", overrides={"norm_topk_prob": False})


def test_our_operator_needs_multiples_of_32() -> None:
    message = refusal("lfm2_moe", "8da4w", overrides={"moe_intermediate_size": 48}, moe_op="lfm2")
    assert re.search(r"in_features=48 is not a multiple of group_size=32", message)


@pytest.mark.parametrize(
    ("model_type", "scheme", "options", "expected"),
    [
        ("lfm2", "8da4w", {"moe_op": "lfm2"}, "--moe-op lfm2: this checkpoint has no experts"),
        ("lfm2_moe", "fp32", {"moe_op": "stock"}, "--moe-op: scheme fp32 leaves the experts unquantized"),
        ("lfm2_moe", "8da4w", {"moe_op": "fast"}, "--moe-op fast: pass one of stock, lfm2 or both"),
        ("lfm2", "8da4w", {"embedding_bits": 2}, "--embedding-bits 2: pass one of 4, 8"),
        ("lfm2", "fp32", {"embedding_bits": 4}, "--embedding-bits 4: scheme fp32"),
        ("lfm2", "fp32", {"max_context": 513}, "--max-context 513: pass 2 to 512"),
        ("lfm2", "fp32", {"max_context": 0}, "--max-context 0: pass 2 to 512"),
    ],
)
def test_options_that_do_not_fit(model_type: str, scheme: str, options: dict, expected: str) -> None:
    assert refusal(model_type, scheme, **options).startswith(expected)


def test_a_checkpoint_without_experts_takes_no_moe_op() -> None:
    assert "has no experts" in refusal("lfm2", "8da4w", moe_op="both")


def test_our_operator_takes_groups_of_32_and_says_so_before_any_work() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    asked = request(checkpoint_of("lfm2_moe", **sizes), "8da4w", moe_op="lfm2")
    with pytest.raises(Lfm2ExportError, match=r"lfm2::moe_ffn takes symmetric int4 in groups of 32; pass --group-size"):
        export.estimate(replace(asked, scheme=asked.scheme.with_group_size(64)))
