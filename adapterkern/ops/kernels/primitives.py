"""What every kernel shares: the activations and the matrix product."""

# mypy: allow-untyped-defs
# The types of a Triton function's arguments are its callers'.
import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bf16 operands, so there every operand is widened to fp32 first.
# Products of 16-bit numbers are exact in fp32, and tensor cores accumulate in fp32, too.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def follow(PDL: tl.constexpr):
    """Wait for the previous kernel, and let the next one start up meanwhile (programmatic dependent launch).

    Called first in a kernel. However early the kernel was started, it reads and writes nothing until the launches it
    depends on are over. Only the next kernel's launch is early (about 1 µs per kernel, from others' measurements).
    """
    if PDL and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.constexpr_function
def partial_stages(stages: int, rows: int, columns: int) -> int:
    """Stages of a loop over fp32 partial sums (rows, columns): at most 128 KiB, including the one in use."""
    return max(1, min(stages, 2**17 // (4 * rows * columns)))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, accumulated in fp32. PRECISION is Triton's input precision; it matters only for fp32 operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def end_of(d: tl.constexpr, UNROLL: tl.constexpr):
    """d as the end of a loop over columns: for odd d, or unless UNROLL, as a number that the compiler does not know.

    LLVM unrolls a loop of few blocks in full. Loads of one or two elements, each with an address of its own, then spill
    up to 2,040 bytes (d = 577), and rows that go through registers, or a tile of 512 sums per row, up to 32 (d = 576).
    """
    if INTERPRETED or (UNROLL and d % 4 == 0):
        return d
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [d], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def settled(acc):
    """``acc``, after a wait for every product of warp groups in flight. No instruction but the wait.

    Triton 3.6 lets a loop's product run on into the next iteration, which needs one slot of shared memory more than
    there are loads ahead. It adds that slot only where nothing else uses the load. An operand that also goes to
    registers (x, for its sums) was overwritten during the product: seen on an H100, wrong by up to 15 % at r >= 128.
    A use of the sum within the loop ends the product there. tests/ops/test_aot.py finds a loop that lacks it.
    """
    if INTERPRETED:
        return acc
    else:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 → dtype, rounded to nearest even. The interpreter truncates to bf16, so there the bits are rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tanh(z):
    # (1 − e)/(1 + e) cancels near zero; there the series up to z⁹ is exact to 1e-8.
    e = tl.exp(-2 * tl.abs(z))
    far = tl.where(z < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    q = z * z
    near = z * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(z) < 0.25, near, far)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """act(z), z in fp32."""
    if ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "relu":
        return tl.where(z < 0, 0.0, z)  # in this order a NaN stays a NaN
    elif ACT == "tanh":
        return _tanh(z)
    else:
        tl.static_assert(ACT == "identity")
        return z


@triton.jit
def activate_grad(z, ACT: tl.constexpr):
    """act'(z), z in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    elif ACT == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACT == "tanh":
        t = _tanh(z)
        return 1 - t * t
    else:
        tl.static_assert(ACT == "identity")
        return tl.full(z.shape, 1.0, tl.float32)
