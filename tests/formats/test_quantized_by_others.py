"""Quantized files of other programs, written here byte by byte: exact numbers, packed where that loses nothing."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import heronry
from heronry import InputError, formats
from heronry.convert import convert
from heronry.formats import rwkv_lightning
from heronry.models.layers import PackedLinear

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 92, 65]])
SIZES = {"width": 64, "heads": 1, "ffn": 96, "rank": 3}
MATRICES = ("receptance", "key", "value", "output")

# three tensors: a bfloat16 [2], b int8 [2, 5], c int4 in groups of 32 [2, 5]
EXAMPLE = bytes.fromhex(
    "52574b5651000100010000000300000001000000000100000200000000000000610200000000000000803f20c0"
    "01000000020200000a0000000000000062020000000000000005000000000000007fc11200817f12ca497f0200000000000000a51da521"
    "01000000030220000a000000000000006302000000000000000500000000000000c70109174d070200000000000000662e6632"
)


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint("7", **SIZES)


def is_matrix(name: str) -> bool:
    return name.endswith(tuple(f".{x}.weight" for x in MATRICES)) or name == "head.weight"


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        heronry.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def dequantized(model):
    """The weights of a model, packed matrices as the numbers that they hold."""
    from heronry.ops.packed import dequantize, untile

    state = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            state[f"{name}.weight"] = dequantize(*untile(module.weight, module.scales, module.out_features))
    return state


def test_the_example_of_rwkv_lightning(tmp_path):
    assert len(EXAMPLE) == 151
    (tmp_path / "a.rwkvq").write_bytes(EXAMPLE)
    a, b, c = (x.read().double() for x in rwkv_lightning.read(tmp_path / "a.rwkvq").values())
    assert a.tolist() == [1, -2.5]
    assert (b[0] - torch.tensor([0.7000542, -0.3472710, 0.0992203, 0, -0.7000542])).abs().max() < 1e-6
    q = torch.tensor([[127, -63, 18, 0, -127], [127, 18, -54, 73, 127]]).double()
    assert torch.equal(b, q * torch.tensor([[0.005512237548828125], [0.01102447509765625]], dtype=torch.float64))
    q = torch.tensor([[7, -4, 1, 0, -7], [7, 1, -3, 4, 7]]).double()
    assert torch.equal(c, q * torch.tensor([[0.0999755859375], [0.199951171875]], dtype=torch.float64))
    for size in range(8, 151):
        (tmp_path / "cut.rwkvq").write_bytes(EXAMPLE[:size])
        with pytest.raises(InputError, match=r"^(damaged or )?truncated .rwkvq file"):
            rwkv_lightning.read(tmp_path / "cut.rwkvq")


def write_rwkvq(path, tensors, int4=(), group=32):
    """A .rwkvq of rwkv_lightning's as its writer makes it: matrices in int8, those in `int4` in 4 bits. Returns the
    numbers of all tensors."""
    expected = {name: x.bfloat16().float() for name, x in tensors.items()}
    data = b"RWKVQ\0\1\0" + struct.pack("<II", 1, len(tensors))
    for name, x in tensors.items():
        kind = 0 if not is_matrix(name) else 3 if name in int4 else 2
        size = group if kind == 3 else 0
        data += struct.pack("<IBBHQ", len(name), kind, x.ndim, size, x.numel()) + name.encode()
        data += struct.pack(f"<{x.ndim}q", *x.shape)
        if kind == 0:
            data += x.bfloat16().view(torch.int16).numpy().tobytes()
            continue
        most = 127 if kind == 2 else 7
        groups = x.float().split(x.shape[1] if kind == 2 else group, dim=1)
        scales = torch.stack([(g.abs().amax(1) / most).clamp_min(5.96e-8).half() for g in groups], 1)
        q = torch.cat([(g / s.float()[:, None]).round() for g, s in zip(groups, scales.T, strict=True)], 1)
        q = q.clamp(-most, most).to(torch.int8)
        if kind == 2:
            data += q.numpy().tobytes()
        else:
            data += ((q[:, ::2] & 15) | (q[:, 1::2] << 4)).view(torch.uint8).numpy().tobytes()
        data += struct.pack("<Q", scales.numel()) + scales.numpy().tobytes()
        size = x.shape[1] if kind == 2 else group
        expected[name] = q.float() * scales.float().repeat_interleave(size, dim=1)[:, : x.shape[1]]
    path.write_bytes(data)
    return expected


@pytest.mark.parametrize("group", [32, 128])
def test_rwkvq_of_rwkv_lightning(group, weights, tmp_path):
    int4 = [name for name in weights if name.endswith(("ffn.key.weight", "att.output.weight"))]
    path = tmp_path / "model.rwkvq"
    expected = write_rwkvq(path, weights, int4, group)
    model = heronry.load(path, dtype="float32")
    assert model.quantization == "int8"
    assert all(isinstance(m, PackedLinear) for m in (model.head, model.blocks[0].att.key, model.blocks[1].ffn.key))
    for name, x in dequantized(model).items():
        assert torch.equal(x, expected[name]), name
    heronry.save(model, tmp_path / "saved")
    again = heronry.load(tmp_path / "saved", dtype="float32")
    assert torch.equal(logits(again), logits(model))
    assert again.fingerprint == model.fingerprint
    assert convert(path, tmp_path / "converted").difference == 0
    assert torch.equal(logits(heronry.load(tmp_path / "converted", dtype="float32")), logits(model))
    assert heronry.load(path, device="meta").quantization == "int8"
    other = {name: x + 0.01 if is_matrix(name) else x for name, x in weights.items()}
    write_rwkvq(tmp_path / "other.rwkvq", other, int4, group)
    assert heronry.load(tmp_path / "other.rwkvq").fingerprint != heronry.load(path).fingerprint
    assert refusal(path, quantize="int4") == "the model is already quantized (int8); quantize the original"


def test_damaged_rwkvq(weights, tmp_path):
    path = tmp_path / "a.rwkvq"

    def told(data):
        path.write_bytes(data)
        return refusal(path)

    assert told(EXAMPLE[:8] + b"\2" + EXAMPLE[9:]) == "rwkv_lightning's .rwkvq of version 2; supported is 1"
    assert told(EXAMPLE + b"xx") == "damaged .rwkvq file: 2 bytes follow its last tensor"
    for place, value in ((16, 2**31), (20, 9), (21, 17), (24, 2**60), (12, 2**31)):
        changed = bytearray(EXAMPLE)
        changed[place : place + (8 if place == 24 else 4 if place in (12, 16) else 1)] = value.to_bytes(
            8 if place == 24 else 4 if place in (12, 16) else 1, "little"
        )
        assert told(bytes(changed)).startswith("damaged"), place
    # a shape of 2^62 numbers that the file does not hold
    head = b"RWKVQ\0\1\0" + struct.pack("<II", 1, 1)
    huge = struct.pack("<IBBHQ", 1, 2, 2, 0, 2**62) + b"w" + struct.pack("<2q", 2**31, 2**31)
    assert told(head + huge) == "truncated .rwkvq file: w is incomplete"
    assert told(head + struct.pack("<IBBHQ", 1, 0, 2, 0, 4) + b"w" + struct.pack("<2q", -2, -2) + bytes(8)).startswith(
        "damaged .rwkvq file: 'w' has the shape [-2, -2]"
    )
    wrong = struct.pack("<IBBHQ", 1, 2, 2, 0, 4) + b"w" + struct.pack("<2q", 2, 2) + bytes(4) + struct.pack("<Q", 3)
    assert told(head + wrong + bytes(6)) == "w [2, 2] has scales that do not fit it, float16 [3]"
    assert told(EXAMPLE) == "quantized matrices of another program, which are read of RWKV-7 only"


def test_int8_with_scales_beside(weights, tmp_path):
    tensors, expected = {"meta": {"v": 1, "scheme": "w8", "layers": [0, 1]}}, {}
    for name, x in weights.items():
        if is_matrix(name) and name != "head.weight":
            scale = (x.abs().amax(1) / 127).half()
            q = (x / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
            tensors |= {name: q, f"{name}.scale": scale}
            expected[name] = q.float() * scale.float()[:, None]
        else:
            tensors[name] = x.squeeze() if x.ndim == 3 else x
    torch.save(tensors, tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth")
    assert model.quantization == "int8"
    for name, x in dequantized(model).items():
        assert torch.equal(x, expected.get(name, weights[name])), name
    tensors["blocks.0.att.key.weight.scale"] = tensors["blocks.0.att.key.weight.scale"][:5]
    torch.save(tensors, tmp_path / "b.pth")
    assert refusal(tmp_path / "b.pth") == (
        "blocks.0.att.key.weight [64, 64] has scales that do not fit it, float16 [5]"
    )
    tensors.pop("blocks.0.att.key.weight")
    torch.save(tensors, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth") == "blocks.0.att.key.weight is missing, of which the file holds scales"


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("kind", ["fp8", "nvfp4", "awq", "res"])
def test_fp8_and_nvfp4(kind, weights, tmp_path):
    random = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for name, x in weights.items():
        if not is_matrix(name):
            tensors[name] = x
            continue
        rows, columns = x.shape
        if kind == "fp8":
            scale = x.abs().max() / 448
            q = (x / scale).to(torch.float8_e4m3fn)
            tensors |= {name: q, f"{name}.fp8_scale": scale}
            expected[name] = q.float() * scale
            continue
        codes = torch.randint(16, x.shape, generator=random)
        blocks = (0.1 + torch.rand(rows, columns // 16, generator=random)).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.173)
        tensors |= {
            name: (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
            f"{name}.nf4_b_scale": blocks,
            f"{name}.nvfp4_t_scale": whole,
        }
        value = torch.tensor(E2M1)[codes] * blocks.float().repeat_interleave(16, 1) * whole
        if kind == "res":
            residual, factor = torch.randn(x.shape, generator=random).to(torch.float8_e4m3fn), torch.tensor(0.01)
            tensors |= {f"{name}.res_fp8": residual, f"{name}.res_fp8_scale": factor}
            value = value + residual.float() * factor
        if kind in ("awq", "res"):
            awq = 0.5 + torch.rand(columns, generator=random)
            tensors[f"{name}.awq_scale"] = awq
            value = value / awq
        expected[name] = value
    torch.save(tensors, tmp_path / "a.pth")
    model = heronry.load(tmp_path / "a.pth", dtype="float32")
    assert model.quantization is None
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected.get(name, weights[name])), name
    assert heronry.load(tmp_path / "a.pth", quantize="int8").quantization == "int8"
    if kind == "nvfp4":
        key = "blocks.0.att.key.weight"
        torch.save(tensors | {f"{key}.nf4_b_scale": tensors[f"{key}.nf4_b_scale"].half()}, tmp_path / "old.pth")
        assert refusal(tmp_path / "old.pth") == (
            f"{key} is quantized in a way that is not supported (uint8 with .nf4_b_scale, .nvfp4_t_scale); use the "
            "original checkpoint"
        )


def f16(x):
    return np.float32(np.float16(x))


def rwkv_quant_matrix(kind, rows, columns, random):
    """Parts, manifest entry and numbers of a random matrix in one of rwkv-quant's kinds, one weight after another."""
    parts, entry, value = {}, {}, np.zeros((rows, columns), np.float32)
    if kind in ("rtn8", "rtn4"):
        codes = (
            random.integers(-7, 8, (rows, columns)) if kind == "rtn4" else random.integers(-127, 128, (rows, columns))
        )
        scale = random.random((rows, 1)).astype(np.float16)
        value = codes.astype(np.float32) * scale.astype(np.float32)
        if kind == "rtn4":
            half = -(-columns // 2)
            packed = np.zeros((rows, half), np.uint8)
            for j in range(columns):
                packed[:, j % half] |= (codes[:, j] + 8).astype(np.uint8) << (4 * (j // half))
            parts["codes_packed"] = packed
            places = np.array([[0, 1], [rows - 1, columns - 1]], np.int32)
            parts |= {"outlier_indices": places, "outlier_values": torch.tensor([2.5, -8.0], dtype=torch.bfloat16)}
            value[0, 1], value[-1, -1] = 2.5, -8
        else:
            parts["codes"] = codes.astype(np.int8)
        return "rtn", parts | {"scale": scale}, entry, value
    if kind == "asym":
        size = 24  # the last block is short
        codes = random.integers(0, 256, (rows, columns)).astype(np.uint8)
        scale, low = (random.random((rows, -(-columns // size))).astype(np.float32) for _ in range(2))
        for c in range(columns):
            value[:, c] = codes[:, c].astype(np.float32) * scale[:, c // size] + low[:, c // size]
        return "asym", {"codes": codes, "gw_scale": scale, "gw_min": low}, {"gw_gs": size}, value
    bits = 8 if kind == "sym8" else 6
    size, sub = (32, 8) if kind.startswith("sb6") else (16, 16)
    blocks, groups = columns // size, -(-columns // (size * sub))
    if kind == "sb6 5 bits":
        bits = 5
    codes = random.integers(0, 1 << bits, (rows, columns))
    if kind != "sym8":
        low = codes & 15
        packed = np.zeros((rows, columns // 2), np.uint8)
        planes = [np.zeros((rows, columns // 8), np.uint8) for _ in range(2)]
        for c in range(columns):
            block, place = divmod(c, size)
            packed[:, block * size // 2 + place % (size // 2)] |= (low[:, c] << (4 * (place // (size // 2)))).astype(
                np.uint8
            )
            for i in range(2):
                planes[i][:, c // 8] |= ((codes[:, c] >> (4 + i) & 1) << (c % 8)).astype(np.uint8)
        parts |= {"codes_packed": packed, "gw_qh": planes[0]}
        if bits == 6:
            parts["gw_qh2"] = planes[1]
    d = (0.01 * random.random((rows, groups))).astype(np.float16)
    if kind.startswith("sb6"):
        dm = (0.01 * random.random((rows, groups))).astype(np.float16)
        qs, qm = (random.integers(0, 64, (rows, groups, 8)) for _ in range(2))
        stream = np.zeros((rows, groups, 12), np.uint8)
        for r in range(rows):
            for g in range(groups):
                for half, numbers in enumerate((qs, qm)):
                    word = sum(int(number) << (6 * i) for i, number in enumerate(numbers[r, g]))
                    stream[r, g, 6 * half : 6 * half + 6] = list(word.to_bytes(6, "little"))
        for r in range(rows):
            for b in range(blocks):
                s = max(f16(np.float32(qs[r, b // 8, b % 8]) * np.float32(d[r, b // 8])), np.float32(1e-8))
                m = f16(np.float32(qm[r, b // 8, b % 8] - 31) * np.float32(dm[r, b // 8]))
                value[r, 32 * b : 32 * b + 32] = codes[r, 32 * b : 32 * b + 32].astype(np.float32) * s + m
        return "sb6", parts | {"gw_qsqm": stream, "gw_d": d, "gw_dm": dm}, {"gw_gs": 32, "gw_sb": 8}, value
    qs = random.integers(-127, 128, (rows, blocks)).astype(np.int8)
    signed = codes - (128 if bits == 8 else 32)
    if bits == 8:
        parts["codes"] = signed.astype(np.int8)
    for r in range(rows):
        for b in range(blocks):
            s = f16(np.float32(qs[r, b]) * np.float32(d[r, b // 16]))
            value[r, 16 * b : 16 * b + 16] = signed[r, 16 * b : 16 * b + 16].astype(np.float32) * s
    return "sym", parts | {"gw_qs": qs, "gw_d": d}, {"gw_gs": 16, "gw_sb": 16}, value


def write_rwkv_quant(path, weights, kind, **changes):
    """A .rwkvq of rwkv-quant's whose matrices are random; returns their numbers."""
    random = np.random.default_rng(0)
    tensors, entries, expected = {}, {}, {}
    for name, x in weights.items():
        if is_matrix(name) and name != "head.weight":
            word, parts, entry, value = rwkv_quant_matrix(kind, *x.shape, random)
            expected[name] = torch.from_numpy(value)
        else:
            word, parts, entry = "dense", {"dense": x.bfloat16()}, {}
            expected[name] = x.bfloat16().float()
        tensors |= {f"{name}::{key}": torch.as_tensor(part) for key, part in parts.items()}
        entries[name] = {"kind": word, "shape": list(x.shape), "fields": list(parts), **entry}
    manifest = {"format": "rwkvq", "format_version": 2, "naming": "world", "n_layer": 2, "n_embd": 64}
    manifest |= {"head_size": 64, "vocab_size": 101, "config": {}, "tensors": entries} | changes
    save_file(tensors, path, metadata={"rwkvq": json.dumps(manifest), "format": "pt"})
    return expected


@pytest.mark.parametrize("kind", ["rtn8", "rtn4", "asym", "sb6 6 bits", "sb6 5 bits", "sym8", "sym6"])
def test_rwkvq_of_rwkv_quant(kind, random_checkpoint, tmp_path):
    weights = random_checkpoint("7", width=64, heads=1, ffn=288, rank=3)  # 288: a superblock and a short one
    path = tmp_path / "a.rwkvq"
    expected = write_rwkv_quant(path, weights, kind)
    model = heronry.load(path, dtype="float32")
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected[name].reshape(x.shape)), name
    assert formats.read(path).description == "a quantized .rwkvq of rwkv-quant's"


def test_damaged_rwkv_quant(weights, tmp_path):
    path = tmp_path / "a.rwkvq"

    def told(**changes):
        write_rwkv_quant(path, weights, "rtn8", **changes)
        return refusal(path)

    assert told(format_version=3) == "rwkv-quant's .rwkvq of version 3; supported is 2"
    assert told(format_version=1) == "rwkv-quant's .rwkvq of version 1; supported is 2"
    assert told(naming="custom") == (
        "rwkv-quant's .rwkvq with the naming 'custom'; supported are BlinkDL's names (world)"
    )
    assert told(n_layer=3) == "config.json says n_layer = 3, but the tensors say 2"
    assert told(tensors={}) == "blocks.0.att.a0 is in the file, but not in its metadata 'rwkvq'"
    assert told(tensors=[]).startswith("its metadata 'rwkvq' cannot be read (AttributeError")
    entry = {"kind": "rtn", "shape": [1 << 40, 1 << 40]}
    entries = {name: {"kind": "dense", "shape": list(x.shape)} for name, x in weights.items()}
    key = "blocks.0.att.key.weight"
    assert told(tensors=entries) == "blocks.0.att.receptance.weight is not complete as 'dense' ('dense' is missing)"
    for kind, shape in (("sb9", [64, 64]), ("rtn", [64, 64, 1]), ("rtn", [-1, -1])):
        assert told(
            tensors={key: {"kind": kind, "shape": shape}} | entries | {key: {"kind": kind, "shape": shape}}
        ) == (f"{key} is not complete as {kind!r} (this kind with the shape {shape} is not supported)")
    assert told(tensors={key: entry} | entries | {key: entry}) == (
        f"{key} is not complete as 'rtn' (codes is int8 [64, 64], expected [{1 << 40}, {1 << 40}])"
    )
    assert told(tensors={key: entry}) == "blocks.0.att.a0 is in the file, but not in its metadata 'rwkvq'"
    save_file(
        {"emb.weight::codes": torch.ones(4, 6, dtype=torch.int8), "emb.weight::scale": torch.ones(4, 1).half()}
        | {"emb.weight::outlier_indices": torch.tensor([[9, 0]]).int(), "emb.weight::outlier_values": torch.ones(1)},
        path,
        metadata={
            "rwkvq": json.dumps(
                {"format_version": 2, "naming": "world", "tensors": {"emb.weight": {"kind": "rtn", "shape": [4, 6]}}}
            )
        },
    )
    with pytest.raises(InputError, match="outliers outside their matrix"):
        formats.read(path).tensors["emb.weight"].read()
    torch.save({"a": Fraction(1, 2)}, path)
    assert refusal(path) == (
        "rwkv-quant's first .rwkvq, a pickle of its own classes; write it again with its newer versions"
    )


def test_reading_does_not_import_pytorchs_compiler(weights, tmp_path):
    """Arithmetic on the meta device imports it, for seconds and 100 MB."""
    write_rwkvq(tmp_path / "a.rwkvq", weights, ["head.weight"])
    write_rwkv_quant(tmp_path / "b.rwkvq", weights, "sb6 6 bits")
    code = "import heronry, sys; [heronry.load(path) for path in sys.argv[1:]]; print('sympy' in sys.modules)"
    files = [str(tmp_path / name) for name in ("a.rwkvq", "b.rwkvq")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
