"""FlashInfer's paged decode attention at 9b's shape, for comparison with `cargo bench -p lapidary-cuda --bench kernels`.

Soft-cap 50, pages of 16, bf16; its output is checked first. Prints `flashinfer B CONTEXT microseconds GB/s`; layers rotate
through more memory than the L2 cache holds. Needs torch and the flashinfer-python package (which compiles its kernels here).
"""

import argparse

import flashinfer
import torch
from baseline import ROTATION_BYTES, median_microseconds

HEADS, KV_HEADS, HEAD_DIM, PAGE, SOFTCAP, SCALE = 16, 8, 256, 16, 50.0, 1 / 16


def reference(q, kv, pages):
    """In f32, one sequence: q [heads, dim], kv [pages, 2, page, kv heads, dim]."""
    k, v = (kv[pages, side].reshape(-1, KV_HEADS, HEAD_DIM).float() for side in (0, 1))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q.float(), k) * SCALE
    return torch.einsum("ht,thd->hd", (SOFTCAP * torch.tanh(scores / SOFTCAP)).softmax(-1), v)


def measure(batch, context, tensor_cores):
    pages_each = context // PAGE
    layer_bytes = 4 * batch * context * KV_HEADS * HEAD_DIM
    copies = max(2, min(64, ROTATION_BYTES // layer_bytes))
    layers = [torch.randn(batch * pages_each, 2, PAGE, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) * 4
    indices = torch.randperm(batch * pages_each, device="cuda", dtype=torch.int32)
    start = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * pages_each
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_cuda_graph=True, use_tensor_cores=tensor_cores, paged_kv_indptr_buffer=start.clone(),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=torch.full((batch,), PAGE, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    last = torch.full((batch,), PAGE, dtype=torch.int32, device="cuda")
    wrapper.plan(start, indices, last, HEADS, KV_HEADS, HEAD_DIM, PAGE, pos_encoding_mode="NONE", logits_soft_cap=SOFTCAP,
                 sm_scale=SCALE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
    got, want = wrapper.run(q, layers[0])[0].float(), reference(q[0], layers[0], indices[:pages_each].long())
    error = ((got - want).norm() / want.norm()).item()
    assert error < 2e-2, f"flashinfer is off by {error}"
    micros = median_microseconds([lambda kv=kv: wrapper.run(q, kv) for _ in range(2) for kv in layers])
    print(f"flashinfer{' tensor cores' if tensor_cores else ''} {batch} {context} {micros:.2f} {layer_bytes / micros / 1e3:.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    arguments = parser.parse_args()
    for tensor_cores in (False, True):
        for batch in arguments.batches:
            for context in arguments.contexts:
                if batch * context <= 1 << 18:
                    measure(batch, context, tensor_cores)


if __name__ == "__main__":
    main()
