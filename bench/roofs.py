"""The device's maximum rates besides the copy that every case has: matrix products, and reads from L2."""

import statistics

import torch

from bench.measure import timer


def gemm_flops(device: torch.device) -> float:
    """FLOPs per second of one large square product in bf16.

    On a CPU a product of 512 is tried first: without bf16 instructions one of 2048 takes a minute.
    """
    measured = timer(device, wall=False)

    def seconds(n: int) -> float:
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        return statistics.median([measured(lambda: a @ b) for _ in range(7)][2:])

    n = 8192 if device.type == "cuda" else 512
    took = seconds(n)
    if device.type != "cuda" and took < 0.1:
        n = 2048
        took = seconds(n)
    return 2 * n**3 / took


def l2_bandwidth(device: torch.device) -> float | None:
    """Bytes per second that all multiprocessors read from a 20 MB buffer that stays in L2; None on a CPU."""
    if device.type != "cuda":
        return None
    import triton
    import triton.language as tl

    @triton.jit
    def read_kernel(p, p_out, n, times, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, times):
            for o in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
                total += tl.load(p + (o + i * BLOCK) % n + tl.arange(0, BLOCK))
        tl.store(p_out + tl.program_id(0), tl.sum(total, 0))

    buffer = torch.randn(5 * 2**20, device=device)
    programs, times = 4 * torch.cuda.get_device_properties(device).multi_processor_count, 20
    out = torch.empty(programs, device=device)
    measured = timer(device, wall=False)

    def read() -> None:
        read_kernel[(programs,)](buffer, out, buffer.numel(), times, BLOCK=4096, num_warps=8)

    return times * buffer.nbytes / statistics.median([measured(read) for _ in range(7)][2:])
