"""What torch reaches on this GPU, for the same shapes as `cargo bench -p lapidary-cuda --bench kernels`, cold weights.

Prints `scaled_mm N K M microseconds fast-microseconds` lines: FP8, a scale a token and an output column, bf16 out, first as
`torch._scaled_mm` adds unless told otherwise, where the sums of tensor cores, which have few bits, are added to full ones on
the way (ours are every 512 products), then with `use_fast_accum`, where they are not. Weights rotate through more memory than
the L2 cache holds; the median of graph replays. With `--beside KERNELS`, that bench's binary, ours and torch's are measured in
turn, twice, on the same warm card, and the lines are `N K M our-microseconds microseconds ratio fast-microseconds fast-ratio`,
of the lowest times; above 1, ours is faster.
"""

import argparse
import re
import subprocess

import torch

SHAPES = {
    "2b": [(4096, 2304), (2304, 2048), (18432, 2304), (2304, 9216)],
    "9b": [(8192, 3584), (3584, 4096), (28672, 3584), (3584, 14336)],
    "27b": [(8192, 4608), (4608, 4096), (73728, 4608), (4608, 36864)],
}
ROTATION_BYTES = 600 << 20
REPEATS = 9


def median_microseconds(calls):
    """Of one call, from graphs that hold all of them one after another."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[REPEATS // 2]


def fp8(*size):
    return (torch.randn(*size, device="cuda") * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


def scaled_mm(n, k, m, is_fast):
    copies = max(2, min(64, ROTATION_BYTES // (n * k)))
    x, scale_x = fp8(m, k), torch.rand(m, 1, device="cuda") + 0.5
    weights = [(fp8(n, k).t(), torch.rand(1, n, device="cuda") + 0.5) for _ in range(copies)]

    def call(weight, scale):
        return lambda: torch._scaled_mm(x, weight, scale_x, scale, out_dtype=torch.bfloat16, use_fast_accum=is_fast)

    repeat = 4 if m <= 64 else 1
    return median_microseconds([call(*weight) for _ in range(repeat) for weight in weights])


def ours(binary, n, k, tokens):
    """Microseconds at each number of tokens."""
    listed = ",".join(map(str, tokens))
    command = [binary, "--only", "fp8", "--models", ",".join(SHAPES), "--shapes", f"{n}x{k}", "--tokens", listed]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {int(m): float(us) for m, us in re.findall(rf"fp8 {n}x{k} M (\d+) +([\d.]+) us", out)}
    return [found[m] for m in tokens]


def both(n, k, m):
    """As it adds unless told otherwise, and fast."""
    return [scaled_mm(n, k, m, is_fast) for is_fast in (False, True)]


def beside(binary, n, k, tokens):
    best = [[float("inf")] * 3] * len(tokens)
    for _ in range(2):
        times = [[mine, *both(n, k, m)] for m, mine in zip(tokens, ours(binary, n, k, tokens))]
        best = [[min(pair) for pair in zip(*rows)] for rows in zip(best, times)]
    for m, (mine, precise, fast) in zip(tokens, best):
        print(f"{n} {k} {m} {mine:.2f} {precise:.2f} {precise / mine:.3f} {fast:.2f} {fast / mine:.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["9b"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64, 512, 2048, 8192])
    parser.add_argument("--beside", metavar="KERNELS", help="the binary of our bench, to measure in turn")
    arguments = parser.parse_args()
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for model in arguments.models:
        for n, k in SHAPES[model]:
            if arguments.beside:
                beside(arguments.beside, n, k, arguments.tokens)
                continue
            for m in arguments.tokens:
                precise, fast = both(n, k, m)
                print(f"scaled_mm {n} {k} {m} {precise:.2f} {fast:.2f}", flush=True)


if __name__ == "__main__":
    main()
