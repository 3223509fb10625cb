"""The faster interpreter does what Triton's does: the same types, the same bits, the same refusals."""

import warnings
from functools import partial
from itertools import cycle, product

import numpy as np
import pytest
import triton.language as tl
from triton.language.core import block_type, constexpr, is_builtin, pointer_type, tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from lowmem_kernels.testing import fast_interpreter

DTYPES = [tl.int1, tl.int32, tl.int64, tl.uint32, tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64]
NUMBERS = [0, 1, -3, 2**31 - 1, 2**31, 2**40, True, 0.0, -0.0, 1.5, 1e-40, 1e300, float("inf"), float("nan")]
PAIRS = [((), ()), ((8,), ()), ((), (8,)), ((1, 8), (4, 1)), ((4, 8), (4, 8)), ((8,), (4, 8))]
OPERATORS = list(fast_interpreter._OF_TENSORS)
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _as_in_a_launch():
    """Integers without a sign are types of their own to the interpreter, but not to the compiler."""
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_core(tl, scope)
    yield
    scope.restore()


def operand(dtype, shape, least=-5, most=5):
    """A tensor as the interpreter has it: a scalar has one element, and bfloat16 is kept as its bits."""
    values = rng.integers(least, most, shape or (1,)).astype(interpreter._get_np_dtype(dtype))
    if values.dtype.kind == "f":
        values.flat[0] = rng.choice([np.nan, np.inf, -0.0, 7.5])
    return tensor(TensorHandle(values, dtype), block_type(dtype, list(shape)) if shape else dtype)


def operands(kinds, shapes, least=-5):
    """Tensors of some types and shapes; what is no type is an operand itself."""
    return [
        operand(kind, shape, least) if isinstance(kind, tl.dtype) else kind
        for kind, shape in zip(kinds, shapes, strict=True)
    ]


def outcome(operation, *given, **options):
    """(type, NumPy's type, shape, bits) of a result, or how the operation refuses."""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = operation(*given, **options)
    except Exception as error:
        return type(error), str(error)
    data = result.handle.data
    return str(result.type), str(result.dtype), [s.value for s in result.shape], data.dtype, data.shape, data.tobytes()


def assert_alike(member, fast, make):
    """For two sets of operands: Triton's code against that of the first call, which makes a plan, and of the second."""
    assert is_builtin(member)
    for _ in range(2):
        given = make()
        expected = outcome(member, *given, _semantic=interpreter.interpreter_semantic)
        assert outcome(fast, *given) == expected, [getattr(x, "type", x) for x in given]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_tensors(name):
    member = getattr(tensor, name)
    fast = fast_interpreter._bound(True, name, member)
    least = 0 if "shift" in name else -5  # no shift by more than there are bits
    for i, (x, y) in enumerate(product(DTYPES, DTYPES)):
        # every pair of shapes for equal types, one for others, so that each dtype meets all of them
        for one, other in PAIRS if x is y else [PAIRS[i % len(PAIRS)]]:
            assert_alike(member, fast, partial(operands, (x, y), (one, other), least))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_numbers(name):
    member = getattr(tensor, name)
    fast = fast_interpreter._bound(True, name, member)
    for i, (dtype, number) in enumerate(product(DTYPES, [5] if "shift" in name else NUMBERS)):
        value = constexpr(number) if i % 4 > 1 else number
        assert_alike(member, fast, partial(operands, (dtype, value), ((4, 8) if i % 2 else (), None), 0))


@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_minimum_and_maximum(name):
    member = getattr(tl, name)
    fast = fast_interpreter._bound(False, name, member)
    for x, y in product(DTYPES, [*DTYPES, *NUMBERS]):
        assert_alike(member, fast, partial(operands, (x, y), ((8,), ())))


def test_where():
    fast = fast_interpreter._bound(False, "where", tl.where)
    shapes = cycle([((4, 8), (4, 8), (4, 8)), ((), (8,), (8,)), ((4, 1), (4, 8), ()), ((), (), ())])
    for kinds in product((tl.int1, tl.int32), [*DTYPES, 1.5, 0, float("nan")], [*DTYPES, 1.5, 0]):
        assert_alike(tl.where, fast, partial(operands, kinds, next(shapes)))


def test_pointers_and_offsets():
    fast = fast_interpreter._bound(True, "__add__", tensor.__add__)
    for pointed, offset in product([*DTYPES, tl.int8], [*DTYPES, 3, -3, 2**40, True, 1.0]):
        kind = pointer_type(pointed)
        pointer = tensor(TensorHandle(np.array([2**40 + 8], np.uint64), kind), kind)
        for shape in ((), (8,)):
            assert_alike(tensor.__add__, fast, lambda shape=shape: [pointer, *operands((offset,), (shape,))])  # noqa: B023


@pytest.mark.parametrize("name", ["to", "cast"])
def test_casts(name):
    member = getattr(tensor, name) if name == "to" else tl.cast
    fast = fast_interpreter._bound(name == "to", name, member)
    for x, y in product(DTYPES, DTYPES):
        for shape in ((), (4, 8)):
            assert_alike(member, fast, lambda shape=shape: [operand(x, shape, 0), y])  # noqa: B023


@pytest.mark.parametrize("slices", [(slice(None), None), (None, slice(None)), (None,), (slice(None),), (None, None)])
def test_brackets(slices):
    member = tensor.__getitem__
    fast = fast_interpreter._bound(True, "__getitem__", member)
    for shape in ((), (8,)):
        assert_alike(member, fast, lambda shape=shape: [operand(tl.float32, shape), slices])


def test_a_short_way_that_has_other_bits_is_not_taken():
    fast = fast_interpreter._planned(fast_interpreter._bound(True, "__add__", tensor.__add__), np.subtract)
    assert_alike(tensor.__add__, fast, lambda: [operand(tl.int32, (8,)), 3])


def test_types_are_one_object_each():
    x, y = (block_type(pointer_type(tl.float32), shape) for shape in ([4, 8], (constexpr(4), 8)))
    assert x is y
    assert x is not block_type(pointer_type(tl.float16), [4, 8])
    assert pointer_type(tl.float32) is not pointer_type(tl.float32, const=True)
    with pytest.raises(ValueError, match="power of 2"):
        block_type(tl.float32, [3])
    with pytest.raises(TypeError, match="0d"):
        block_type(tl.float32, [])
