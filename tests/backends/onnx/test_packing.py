"""The packed layouts, proven by the operators that read them: onnxruntime against numpy on the dequantized weights."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lfm2_export.backends.onnx.packing import empty_rows, pack_chunk, pack_codes
from lfm2_export.quant.algorithms import get_algorithm
from lfm2_export.quant.formats import IntFormat, QuantizedTensor
from lfm2_export.quant.groups import Scratch
from tests.backends.onnx.rows import interleave_gate_up, pack_rows, split_gate_up, unpack_codes, unpack_rows

# Relative to the output's norm. INT8: with int8 activations, accuracy_level 4. HALF: float16 results.
EXACT, INT8_LINEAR, INT8_EXPERTS, HALF = 3e-6, 1.5e-2, 3e-2, 1e-3  # measured: 4e-7, 8e-3, 1.2e-2, 2.3e-4
ONNX_DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

with_and_without_zero_points = pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "symmetric"])


def quantized(rng: np.random.Generator, rows: int, in_features: int, format: IntFormat) -> QuantizedTensor:
    return get_algorithm("refit")(rng.standard_normal((rows, in_features)).astype(np.float32) * 0.05, format)


def run(nodes, initializers, feeds, outputs):
    """``feeds`` arrays by name, ``outputs`` (name, dtype): runs the nodes on the CPU provider."""
    names = {np.dtype(dtype): number for dtype, number in ONNX_DTYPES.items()} | {np.dtype("int64"): TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, names[array.dtype], array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(name, ONNX_DTYPES[dtype], None) for name, dtype in outputs],
        initializer=[numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]).run(None, feeds)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


def matmul_nbits(tensor: QuantizedTensor, values: np.ndarray, accuracy_level: int) -> np.ndarray:
    rows, in_features = tensor.qdata.shape
    bits, block_size = tensor.format.bits, tensor.format.group_size
    packed = pack_rows(tensor)
    packed["qdata"] = packed["qdata"].reshape(rows, in_features // block_size, block_size * bits // 8)
    attributes = {"K": in_features, "N": rows, "bits": bits, "block_size": block_size}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *packed],
        ["y"],
        domain="com.microsoft",
        accuracy_level=accuracy_level,
        **attributes,
    )
    return run([node], packed, {"x": values}, [("y", str(values.dtype))])[0]


@pytest.mark.parametrize(("accuracy_level", "tolerance"), [(0, EXACT), (4, INT8_LINEAR)])
@pytest.mark.parametrize(("in_features", "group_size"), [(96, 32), (160, 32), (384, 128), (256, 256), (48, 16)])
@pytest.mark.parametrize("bits", [4, 8])
@with_and_without_zero_points
def test_matmulnbits_computes_with_the_dequantized_weights(
    bits, symmetric, in_features, group_size, accuracy_level, tolerance
):
    rng = np.random.default_rng(0)
    format = IntFormat(bits=bits, group_size=group_size, symmetric=symmetric, signed_scale=symmetric)
    tensor = quantized(rng, 37, in_features, format)
    for tokens in (1, 5):
        values = rng.standard_normal((tokens, in_features)).astype(np.float32)
        error = relative_error(matmul_nbits(tensor, values, accuracy_level), values @ tensor.dequantize().T)
        print(f"{tokens} tokens: {error:.2e}")
        assert error < tolerance


@pytest.mark.parametrize("bits", [4, 8])
@with_and_without_zero_points
def test_matmulnbits_takes_float16_scales_with_float16_activations(bits, symmetric):
    rng = np.random.default_rng(1)
    tensor = quantized(rng, 40, 96, IntFormat(bits=bits, symmetric=symmetric, scale_dtype="float16"))
    values = rng.standard_normal((3, 96)).astype(np.float16)
    expected = values.astype(np.float32) @ tensor.dequantize().T
    error = relative_error(matmul_nbits(tensor, values, 0), expected)
    print(f"{error:.2e}")
    assert error < HALF


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_one_changed_code_or_zero_point_is_noticed(accuracy_level):
    rng = np.random.default_rng(2)
    tensor = quantized(rng, 12, 96, IntFormat(bits=4, symmetric=False))
    values = rng.standard_normal((8, 96)).astype(np.float32)
    expected = values @ tensor.dequantize().T
    tolerance = EXACT if accuracy_level == 0 else INT8_LINEAR
    for changed in (tensor.qdata, tensor.zero_point):
        kept = changed[11, 2]
        changed[11, 2] ^= 15
        error = relative_error(matmul_nbits(tensor, values, accuracy_level), expected)
        changed[11, 2] = kept
        print(f"one changed: {error:.2e}, tolerance {tolerance:.0e}")
        assert error > tolerance
    assert relative_error(matmul_nbits(tensor, values, accuracy_level), expected) < tolerance


def gather_node(tensor: QuantizedTensor, inputs: list[str]):
    return helper.make_node(
        "GatherBlockQuantized",
        inputs,
        ["rows"],
        domain="com.microsoft",
        bits=tensor.format.bits,
        block_size=tensor.format.group_size,
        quantize_axis=1,
        gather_axis=0,
    )


@pytest.mark.parametrize(("scale_dtype", "tolerance"), [("float32", 0.0), ("float16", HALF)])
@pytest.mark.parametrize(("in_features", "group_size"), [(96, 32), (384, 128)])
@pytest.mark.parametrize("bits", [4, 8])
@with_and_without_zero_points
def test_gatherblockquantized_returns_the_dequantized_rows(
    bits, symmetric, in_features, group_size, scale_dtype, tolerance
):
    rng = np.random.default_rng(3)
    format = IntFormat(
        bits=bits, group_size=group_size, symmetric=symmetric, signed_scale=symmetric, scale_dtype=scale_dtype
    )
    tensor = quantized(rng, 50, in_features, format)
    packed = pack_rows(tensor)
    names = list(packed)
    ids = rng.integers(0, 50, (2, 5))
    node = gather_node(tensor, [names[0], "ids", *names[1:]])
    found = run([node], packed, {"ids": ids}, [("rows", scale_dtype)])[0]
    error = relative_error(found, tensor.dequantize()[ids])
    print(f"{error:.2e}")
    assert error <= tolerance


@with_and_without_zero_points
def test_tied_embedding_and_head_read_the_same_bytes(symmetric):
    rng = np.random.default_rng(4)
    tensor = quantized(rng, 50, 96, IntFormat(bits=8, symmetric=symmetric))
    packed = pack_rows(tensor)
    table, others = packed["qdata"], [name for name in packed if name != "qdata"]
    head = table.reshape(50, 3, 32)
    assert np.shares_memory(head, table)
    ids, values = rng.integers(0, 50, (1, 4)), rng.standard_normal((2, 96)).astype(np.float32)
    nodes = [
        gather_node(tensor, ["qdata", "ids", *others]),
        helper.make_node(
            "MatMulNBits",
            ["x", "head", *others],
            ["logits"],
            domain="com.microsoft",
            K=96,
            N=50,
            bits=8,
            block_size=32,
        ),
    ]
    outputs = [("rows", "float32"), ("logits", "float32")]
    rows, logits = run(nodes, packed | {"head": head}, {"ids": ids, "x": values}, outputs)
    assert np.array_equal(rows, tensor.dequantize()[ids])
    assert relative_error(logits, values @ tensor.dequantize().T) < EXACT


EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 96, 160  # 3 and 5 groups of 32: odd counts leave half a byte of zero points


def expert_layer(rng: np.random.Generator, format: IntFormat) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """QMoE's initializers by name, and per expert the dequantized w1, w3, w2."""
    stacked: dict[str, list[np.ndarray]] = {}
    weights = []
    for _ in range(EXPERTS):
        w1, w3 = (rng.standard_normal((INNER, HIDDEN)).astype(np.float32) * 0.05 for _ in range(2))
        fc1 = get_algorithm("refit")(interleave_gate_up(w1, w3), format)
        fc2 = quantized(rng, HIDDEN, INNER, format)
        for name, tensor in (("fc1", fc1), ("fc2", fc2)):
            for role, array in pack_rows(tensor).items():
                stacked.setdefault(f"{name}_{role}", []).append(array)
        weights.append([*split_gate_up(fc1.dequantize()), fc2.dequantize()])
    return {name: np.stack(arrays) for name, arrays in stacked.items()}, weights


def qmoe(initializers, format: IntFormat, values, selection, mixing, accuracy_level) -> np.ndarray:
    inputs = ["x", "selection", "fc1_qdata", "fc1_scale", "", "fc2_qdata", "fc2_scale", "", "", "", "", "", "", ""]
    if not format.symmetric:
        inputs[11], inputs[12] = "fc1_zero_point", "fc2_zero_point"
    node = helper.make_node(
        "QMoE",
        [*inputs, "mixing"],
        ["y"],
        domain="com.microsoft",
        k=TOP_K,
        expert_weight_bits=format.bits,
        block_size=format.group_size,
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        accuracy_level=accuracy_level,
    )
    feeds = {"x": values, "selection": selection, "mixing": mixing}
    return run([node], initializers, feeds, [("y", "float32")])[0]


def reference_experts(weights, values, selection, mixing) -> np.ndarray:
    out = np.zeros(values.shape)
    for token, chosen in enumerate(np.argsort(-selection, axis=1)[:, :TOP_K]):
        shares = mixing[token, chosen] / mixing[token, chosen].sum()
        for share, expert in zip(shares, chosen, strict=True):
            w1, w3, w2 = weights[expert]
            gate = w1 @ values[token]
            out[token] += share * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ values[token])))
    return out


@pytest.mark.parametrize(
    ("bits", "accuracy_level", "tolerance"), [(4, 0, EXACT), (4, 4, INT8_EXPERTS), (8, 4, INT8_EXPERTS)]
)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@with_and_without_zero_points
def test_qmoe_computes_with_the_dequantized_experts(bits, symmetric, scale_dtype, accuracy_level, tolerance):
    rng = np.random.default_rng(5)
    format = IntFormat(bits=bits, symmetric=symmetric, signed_scale=symmetric, scale_dtype=scale_dtype)
    initializers, weights = expert_layer(rng, format)
    for tokens in (1, 7):
        values = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
        mixing = 1 / (1 + np.exp(-rng.standard_normal((tokens, EXPERTS)).astype(np.float32)))
        selection = mixing + rng.standard_normal(EXPERTS).astype(np.float32)  # the expert bias picks, but does not mix
        found = qmoe(initializers, format, values, selection, mixing, accuracy_level)
        error = relative_error(found, reference_experts(weights, values, selection, mixing))
        swapped = [[w3, w1, w2] for w1, w3, w2 in weights]
        control = relative_error(found, reference_experts(swapped, values, selection, mixing))
        print(f"{tokens} tokens: {error:.2e}; gate and up exchanged: {control:.2e}")
        assert error < tolerance < control


@pytest.mark.parametrize("bits", [4, 8])
@with_and_without_zero_points
def test_unpacking_gives_back_what_was_packed(bits, symmetric):
    rng = np.random.default_rng(6)
    format = IntFormat(bits=bits, symmetric=symmetric, signed_scale=symmetric, scale_dtype="float16")
    tensor = quantized(rng, 12, 160, format)
    packed = pack_rows(tensor)
    shapes = {  # MatMulNBits, and QMoE with 3 experts of 4 rows
        "matmul": {"qdata": (12, 5, 32 * bits // 8)},
        "experts": {"qdata": (3, 4, -1), "scale": (3, 4, 5), "zero_point": (3, 4, -1)},
    }
    for shape in ({}, *shapes.values()):
        arrays = {role: array.reshape(shape.get(role, array.shape)) for role, array in packed.items()}
        found = unpack_rows(format, **arrays)
        assert np.array_equal(found.qdata, tensor.qdata)
        assert np.array_equal(found.scale, tensor.scale)
        assert np.array_equal(found.dequantize(), tensor.dequantize())


def test_earlier_code_is_in_the_lower_half_of_a_byte():
    codes = np.array([[1, 2, 3], [15, 0, 9]], np.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert unpack_codes(pack_codes(codes, 4), 4, 3).tolist() == codes.tolist()
    assert pack_codes(codes, 8) is codes
    strided = np.arange(32, dtype=np.uint8).reshape(4, 8)[:, ::2] % 16
    assert np.array_equal(unpack_codes(pack_codes(strided, 4), 4, 4), strided)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize(("in_features", "group_size"), [(96, 32), (48, 16), (256, 256)])
@pytest.mark.parametrize("bits", [4, 8])
@with_and_without_zero_points
def test_chunks_become_the_bytes_of_the_whole_matrix(bits, symmetric, in_features, group_size, scale_dtype):
    """Two matrices, rows interleaved, chunk by chunk."""
    rng = np.random.default_rng(3)
    format = IntFormat(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    gate, up = rng.standard_normal((2, 10, in_features)).astype(np.float32)
    expected = pack_rows(get_algorithm("refit")(interleave_gate_up(gate, up), format))
    packed, scratch = empty_rows(format, 20, in_features), Scratch()
    for offset, matrix in enumerate((gate, up)):
        for start, stop in ((0, 7), (7, 10)):
            rows = range(offset, 20, 2)[start:stop]
            chunk = get_algorithm("refit").rows(matrix[start:stop], format, scratch, fqn="w", rows=rows)
            pack_chunk(chunk, slice(rows.start, rows.stop, rows.step), packed)
    assert packed.keys() == expected.keys()
    for role, array in expected.items():
        assert packed[role].dtype == array.dtype
        odd = role == "zero_point" and bits == 4 and in_features // group_size % 2
        np.testing.assert_array_equal(packed[role], array, err_msg=f"{role}{', the last half unused' if odd else ''}")
