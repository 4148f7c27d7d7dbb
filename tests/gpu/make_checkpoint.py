"""Makes a Gemma-2-shaped FP8 checkpoint of random weights, for speed and agreement tests: such files are too large to keep.

    python3 tests/gpu/make_checkpoint.py 9b /dev/shm/gemma-9b [--tokenizer tests/fixtures/demo] [--layers N]

AutoFP8 static: e4m3 weights with a scale a tensor, a static input scale a projection. Needs torch; uses a GPU if there is one.
"""

import argparse
import json
import shutil
import struct
from pathlib import Path

import torch

# hidden, intermediate, layers, query heads, key/value heads, head size, query_pre_attn_scalar
SHAPES = {
    "2b": (2304, 9216, 26, 8, 4, 256, 256),
    "9b": (3584, 14336, 42, 16, 8, 256, 256),
    "27b": (4608, 36864, 46, 32, 16, 128, 144),
}
VOCABULARY = 256000
CODE_STD = 64.0  # of e4m3 codes: spread over many binades, clipped nowhere
DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


def config(shape, layers):
    hidden, inner, all_layers, heads, kv_heads, head_dim, scalar = shape
    return {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers or all_layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "query_pre_attn_scalar": scalar, "vocab_size": VOCABULARY, "max_position_embeddings": 8192,
        "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "bos_token_id": 2,
        "eos_token_id": [1, 107], "pad_token_id": 0, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    }  # fmt: skip


def tensors(shape, layers, device):
    """Names and makers, so that the header can be written before any tensor exists."""
    hidden, inner, all_layers, heads, kv_heads, head_dim, _ = shape
    generator = torch.Generator(device=device).manual_seed(20)

    def normal(*size, std):
        return torch.randn(*size, generator=generator, device=device) * std

    def linear(name, rows, cols, input_scale):
        yield f"{name}.weight", (rows, cols), torch.float8_e4m3fn, lambda: normal(rows, cols, std=CODE_STD).clamp(-448, 448)
        yield f"{name}.weight_scale", (), torch.float32, lambda: torch.tensor(1.0 / (CODE_STD * cols**0.5))
        yield f"{name}.input_scale", (), torch.float32, lambda: torch.tensor(input_scale)

    def norm(name):
        yield f"{name}.weight", (hidden,), torch.bfloat16, lambda: normal(hidden, std=0.2)

    yield "model.embed_tokens.weight", (VOCABULARY, hidden), torch.bfloat16, lambda: normal(VOCABULARY, hidden, std=hidden**-0.5)
    for layer in range(layers or all_layers):
        prefix = f"model.layers.{layer}"
        for projection, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            yield from linear(f"{prefix}.self_attn.{projection}_proj", rows, hidden, 6.0 / 448)
        yield from linear(f"{prefix}.self_attn.o_proj", hidden, heads * head_dim, 4.0 / 448)
        for projection in ("gate", "up"):
            yield from linear(f"{prefix}.mlp.{projection}_proj", inner, hidden, 6.0 / 448)
        yield from linear(f"{prefix}.mlp.down_proj", hidden, inner, 8.0 / 448)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield from norm(f"{prefix}.{name}_layernorm")
    yield from norm("model.norm")


def write(folder, rows):
    """One safetensors file, tensor by tensor: no more than one of them is ever in memory."""
    rows, header, offset = list(rows), {}, 0
    for name, size, dtype, _ in rows:
        count = 1
        for extent in size:
            count *= extent
        end = offset + count * torch.empty((), dtype=dtype).element_size()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, dtype, make in rows:
            value = make().to(dtype).cpu().contiguous()
            file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.dim() else value.reshape(1).view(torch.uint8).numpy().tobytes())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "fixtures/demo")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[arguments.model]
    write(arguments.folder, tensors(shape, arguments.layers, device))
    (arguments.folder / "config.json").write_text(json.dumps(config(shape, arguments.layers), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(arguments.tokenizer / name, arguments.folder / name)


if __name__ == "__main__":
    main()
