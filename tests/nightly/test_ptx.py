"""The emulator of a GPU: Triton's language against PyTorch, and faults that the emulator must find.

``make test-ptx`` runs this file, with the tests of the tiles.
"""

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")
import triton
import triton.language as tl
from ptx import AccessError

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret or torch.cuda.is_available(), reason="nothing is emulated"
)
SIZE = 256
WARPS = [1, 4]


@triton.jit
def numbers_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x * y + x)
    tl.store(out_ptr + SIZE + i, x / y)
    tl.store(out_ptr + 2 * SIZE + i, tl.exp(x))
    tl.store(out_ptr + 3 * SIZE + i, tl.log(tl.abs(x)))
    tl.store(out_ptr + 4 * SIZE + i, tl.sqrt(tl.abs(x)))
    tl.store(out_ptr + 5 * SIZE + i, tl.maximum(x, y))
    tl.store(out_ptr + 6 * SIZE + i, tl.where(x < y, x, -y))
    tl.store(out_ptr + 7 * SIZE + i, x.to(tl.bfloat16).to(tl.float32))
    tl.store(out_ptr + 8 * SIZE + i, x.to(tl.float16).to(tl.float32))
    tl.store(out_ptr + 9 * SIZE + i, x.to(tl.int32).to(tl.float32))
    tl.store(out_ptr + 10 * SIZE + i, tl.cumsum(x, axis=0))
    tl.store(out_ptr + 11 * SIZE + i, tl.sum(x, axis=0) + 0 * x)
    tl.store(out_ptr + 12 * SIZE + i, tl.gather(x, SIZE - 1 - i, axis=0))


@pytest.mark.parametrize("warps", WARPS)
def test_numbers(warps):
    torch.manual_seed(0)
    x, y = 3 * torch.randn(2, SIZE)
    out = torch.full((13, SIZE), torch.nan)
    numbers_kernel[1,](x, y, out, SIZE, num_warps=warps)
    expected = [
        x * y + x, x / y, x.exp(), x.abs().log(), x.abs().sqrt(), x.maximum(y),
        torch.where(x < y, x, -y), x.bfloat16().float(), x.half().float(), x.trunc(), x.cumsum(0),
        x.sum().expand(SIZE), x.flip(0),
    ]  # fmt: skip
    # 2^-22, the error of a GPU's approximations, and sums in another order.
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-6, atol=2e-5)


@triton.jit
def halves_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.maximum(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maximum_of_halves(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(2, 32).to(dtype)
    x[0], y[1] = torch.nan, torch.nan
    out = torch.empty_like(x)
    halves_kernel[1,](x, y, out, 32, num_warps=1)  # a lane has one
    torch.testing.assert_close(out, torch.fmax(x, y), rtol=0, atol=0)


@triton.jit
def not_numbers_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, y))
    tl.store(out_ptr + SIZE + i, tl.maximum(x, y, tl.PropagateNan.ALL))
    tl.store(out_ptr + 2 * SIZE + i, tl.where(x < y, 1.0, 0.0))
    tl.store(out_ptr + 3 * SIZE + i, tl.where(x != y, 1.0, 0.0))
    tl.store(out_ptr + 4 * SIZE + i, x.to(tl.int32).to(tl.float32))


def test_not_numbers():
    """A GPU's maximum of NaN and a number is the number."""
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([nan, 1.0, nan, inf]).repeat(8)
    y = torch.tensor([2.0, nan, nan, nan]).repeat(8)
    out = torch.zeros(5, 32)
    not_numbers_kernel[1,](x, y, out, 32, num_warps=1)
    largest = 2.0**31
    expected = [[2, 1, nan, inf], [nan] * 4, [0] * 4, [1] * 4, [0, 1, 0, largest]]
    expected = torch.tensor(expected).float().repeat(1, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def integers_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    small_a, small_b = a.to(tl.int16), b.to(tl.int16)
    tl.store(out_ptr + i, a // b)
    tl.store(out_ptr + SIZE + i, a % b)
    tl.store(out_ptr + 2 * SIZE + i, (a >> 3) ^ (b << 2))
    tl.store(out_ptr + 3 * SIZE + i, (a.to(tl.int64) * b.to(tl.int64) >> 16).to(tl.int32))
    tl.store(out_ptr + 4 * SIZE + i, (a.to(tl.int64) * 65536 // b).to(tl.int32))
    tl.store(out_ptr + 5 * SIZE + i, tl.maximum(small_a, small_b).to(tl.int32))
    tl.store(out_ptr + 6 * SIZE + i, tl.max(a, axis=0) + 0 * a)
    tl.store(out_ptr + 7 * SIZE + i, (a.to(tl.uint32) >> 28).to(tl.int32))


@pytest.mark.parametrize("warps", WARPS)
def test_integers(warps):
    torch.manual_seed(0)
    a = torch.randint(-30000, 30000, (SIZE,), dtype=torch.int32)
    b = torch.randint(1, 300, (SIZE,), dtype=torch.int32) * torch.randn(SIZE).sign().int()
    out = torch.full((8, SIZE), -1, dtype=torch.int32)
    integers_kernel[1,](a, b, out, SIZE, num_warps=warps)
    long_a, long_b = a.long(), b.long()
    expected = [
        torch.div(a, b, rounding_mode="trunc"), torch.fmod(a, b), (a >> 3) ^ (b << 2),
        long_a * long_b >> 16, torch.div(long_a * 65536, long_b, rounding_mode="trunc"),
        a.maximum(b), a.max().expand(SIZE), (long_a % 2**32) >> 28,
    ]  # fmt: skip
    assert out.tolist() == torch.stack([x.int() for x in expected]).tolist()


@triton.jit
def matrices_kernel(a_ptr, b_ptr, out_ptr, transposed_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(out_ptr + place, tl.dot(a, b, input_precision="ieee"))
    tl.store(transposed_ptr + place, tl.trans(a).to(transposed_ptr.dtype.element_ty))


@pytest.mark.parametrize("warps", WARPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices(warps, dtype):
    torch.manual_seed(0)
    a, b, out = torch.randn(3, 32, 32)
    transposed = torch.zeros(32, 32, dtype=dtype)
    matrices_kernel[1,](a, b, out, transposed, 32, num_warps=warps)
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-5)
    assert torch.equal(transposed, a.T.to(dtype))


@triton.jit
def programs_kernel(x_ptr, count_ptr, out_ptr, LENGTH: tl.constexpr):
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    i = tl.arange(0, LENGTH)
    steps = 0
    while steps < row % 5:  # programs part, and meet again
        steps += 1
    tl.store(out_ptr + row * LENGTH + i, tl.load(x_ptr + row * LENGTH + i) * steps)
    tl.atomic_add(count_ptr, row.to(tl.int64))


def test_programs():
    x = torch.randn(200, 32)
    out, count = torch.zeros_like(x), torch.zeros(1, dtype=torch.int64)
    programs_kernel[50, 4](x, count, out, 32, num_warps=1)
    assert torch.equal(out, x * (torch.arange(200) % 5)[:, None])
    assert count == 199 * 100


@triton.jit
def flip_kernel(x_ptr, SIZE: tl.constexpr, WAIT: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, i.to(tl.float32))
    if WAIT:
        tl.debug_barrier()
    tl.store(x_ptr + SIZE + i, tl.load(x_ptr + SIZE - 1 - i))


def flipped(wait):
    x = torch.full((2, SIZE), -1.0)
    flip_kernel[1,](x, SIZE, wait, num_warps=4)
    return x[1]


def test_a_forgotten_barrier_shows():
    assert torch.equal(flipped(wait=True), torch.arange(SIZE).flip(0).float())
    assert not torch.equal(flipped(wait=False), torch.arange(SIZE).flip(0).float())


@triton.jit
def copy_kernel(x_ptr, out_ptr, first, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + tl.multiple_of(first + i, 4)))


def test_a_wrong_address_is_an_error():
    x, out = torch.randn(2 * SIZE), torch.zeros(SIZE)
    copy_kernel[1,](x, out, 4, SIZE, num_warps=1)
    assert torch.equal(out, x[4 : SIZE + 4])
    with pytest.raises(AccessError, match="is in no storage"):
        copy_kernel[1,](x, out, SIZE + 4, SIZE, num_warps=1)
    with pytest.raises(AccessError, match="is not aligned"):
        copy_kernel[1,](x, out, 2, SIZE, num_warps=1)
