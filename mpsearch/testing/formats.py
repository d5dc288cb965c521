"""What every number format must do, whoever wrote it.

``check_format(fmt)`` runs all of `CHECKS` on one format, ``check_family(formats)`` on several of one family together.
Call them in a test of your own::

    @pytest.mark.parametrize("text", Mine.examples)
    def test_keeps_the_laws(text):
        check_format(Mine.read(text))

Formats of KV caches hold no weights: their names are checked, and the format of their numbers as that of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.packing import pack, unpack
from mpsearch.model.quantize import TORCH_DTYPES, dequantize, fake_quantize, quantize
from mpsearch.testing.format_cases import WIDTHS, awkward, cases, evidence, rounded, same_bits, shapes

#: A constant weight may move by this share: half the widest step of a four-bit float, 4 to 6, seen from 5, and a bit.
CONSTANT = 0.35
#: Rounding may not lose more than this share of the squares; ternary scaled to the largest weight loses 0.8.
ENERGY = 0.9


def check(holds: bool, fmt: Format, layer: Layer | None, law: str) -> None:
    """Fail by naming the format, the layer and the law."""
    if not holds:
        where = f" on {layer.name} {layer.shape}" if layer else ""
        raise AssertionError(f"{fmt}{where}: {law}")


def check_name(fmt: Format) -> None:
    """It prints and reads back, is a value, and says what it is for."""
    kind = type(fmt)
    check(kind.read(str(fmt)) == fmt, fmt, None, "does not read back as it prints")
    check(hash(kind.read(str(fmt))) == hash(fmt), fmt, None, "equal formats have unequal hashes")
    for text in ("", "no-such-format", f"{fmt}-no-such-ending", f" {fmt}"):
        try:
            check(kind.read(text) is None, fmt, None, f"reads '{text}'")
        except InputError as error:
            check(error.code in ("E109", "E110"), fmt, None, f"refuses '{text}' with {error.code}, not E110")
    check(bool(kind.family and kind.purpose and kind.examples), fmt, None, "family, purpose or examples are empty")
    for text in kind.examples:
        check(str(kind.read(text)) == text, fmt, None, f"its example '{text}' does not read back")
    check(fmt.bits > 0, fmt, None, "has no bits")
    try:
        fmt.family = "x"  # type: ignore[misc]
    except (AttributeError, TypeError):
        return
    raise AssertionError(f"{fmt}: can be changed; make it a frozen dataclass")


def check_fit(fmt: Format) -> None:
    """Every layer is taken or refused with a reason, and rounding refuses for that very reason."""
    check(bool(cases(fmt)), fmt, None, f"takes no layer of any width of {WIDTHS}")
    check(bool(fmt.refuses(Layer("k", "kv_cache", (2, 64)))), fmt, None, "takes a KV cache")
    for layer in shapes():
        # Rounding sees a shape and its axes, not whether they are a convolution's or an embedding's.
        layer = replace(layer, kind="expert" if layer.kind == "expert" else "linear")
        problem = fmt.refuses(layer)
        if problem:
            try:
                rounded(fmt, layer, torch.ones(layer.shape))
            except InputError as error:
                check(error.code == "E130", fmt, layer, f"refused with {error.code}, not E130")
                check(problem in str(error), fmt, layer, "is refused for another reason than refuses() gives")
            else:
                check(False, fmt, layer, f"rounds what it refuses ({problem})")


def check_bytes(fmt: Format) -> None:
    """What is packed has exactly the promised parts and bytes, and reads back."""
    for layer, weight in cases(fmt, widths=3):
        made = quantize(weight, fmt, layer.row_axes, evidence=evidence(fmt, layer))
        priced = fmt.weight.itemised_bytes(layer)
        check(next(iter(priced)) == "payload", fmt, layer, f"payload is not the first of {list(priced)}")
        check(all(type(size) is int and size > 0 for size in priced.values()), fmt, layer, f"empty parts: {priced}")
        check(list(made.parts) == list(priced), fmt, layer, f"parts {list(made.parts)}, priced are {list(priced)}")
        packed = pack(made, fmt)
        sizes = {name: part.size for name, part in packed.items()}
        check(list(sizes.items()) == list(priced.items()), fmt, layer, f"packed bytes {sizes}, priced {priced}")
        check(all(part.ndim == 1 and part.dtype == "uint8" for part in packed.values()), fmt, layer, "not flat bytes")
        check(fmt.effective_bits(layer) * layer.weights == 8 * fmt.bytes(layer), fmt, layer, "effective bits are wrong")
        back = unpack(packed, fmt, layer)
        check(list(back.parts) == list(made.parts), fmt, layer, "unpacked parts are others than packed ones")
        for name, part in made.parts.items():
            check(same_bits(back.parts[name], part), fmt, layer, f"{name} does not come back from its bytes")
        check(same_bits(dequantize(back), rounded(fmt, layer, weight)), fmt, layer, "bytes stand for other weights")


def check_codes(fmt: Format) -> None:
    """The stored codes stand for exactly what `fake_quantize` returns, for ordinary and awkward numbers."""
    for layer, weight in cases(fmt):
        for kind, numbers in awkward(weight).items():
            try:
                made = quantize(numbers, fmt, layer.row_axes, evidence=evidence(fmt, layer))
            except InputError as error:
                too_large = error.code == "E421" and kind in ("huge", "largest", "limit")
                check(too_large, fmt, layer, f"{kind} numbers: {error}")
                continue
            found = rounded(fmt, layer, numbers)
            check(bool(torch.isfinite(found).all()), fmt, layer, f"{kind} numbers become NaN or infinite")
            check(same_bits(dequantize(made), found), fmt, layer, f"{kind} numbers: codes stand for other weights")
            reach = float(found.abs().max()) <= 2 * float(numbers.abs().max()) + 1e-30
            check(reach or kind == "tiny", fmt, layer, f"{kind} numbers grow to more than twice the largest")
            if kind in ("normal", "mixed", "huge", "largest", "limit", "positive", "negative"):
                check_energy(fmt, layer, numbers, found)


def check_argument(fmt: Format) -> None:
    """The weight is left as it is; the answer lies in memory of its own, of the weight's type and shape."""
    for layer, weight in cases(fmt):
        for dtype in TORCH_DTYPES.values():
            given = weight.to(dtype)
            before = given.clone()
            found = rounded(fmt, layer, given)
            quantize(given, fmt, layer.row_axes, evidence=evidence(fmt, layer))
            check(same_bits(given, before), fmt, layer, f"writes to the {dtype} weight")
            check((found.dtype, found.shape) == (dtype, given.shape), fmt, layer, "changes type or shape")
            check(found.is_contiguous() and not found.requires_grad, fmt, layer, "is strided or wants gradients")
            apart = found.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
            check(apart, fmt, layer, f"returns the memory of the {dtype} weight")
            single = rounded(fmt, layer, weight.to(dtype).float())
            if dtype == torch.float16:
                single = single.clamp(-65504.0, 65504.0)
            check(torch.equal(found, single.to(dtype)), fmt, layer, f"rounds {dtype} numbers as others than float32")


def check_strides(fmt: Format) -> None:
    """Strides, axes and views change nothing."""
    for layer, weight in cases(fmt):
        expected = rounded(fmt, layer, weight)
        wide = torch.zeros([2 * n for n in layer.shape])
        view = wide[tuple(slice(None, None, 2) for _ in layer.shape)]
        view.copy_(weight)
        turned = weight.movedim(0, -1).contiguous().movedim(-1, 0)
        for given in (view, turned, torch.nn.Parameter(weight.clone())):
            check(same_bits(rounded(fmt, layer, given), expected), fmt, layer, "depends on strides")
        axes = layer.row_axes
        rows = weight.movedim(axes, tuple(range(len(axes)))).reshape(layer.rows, -1)
        flat = fake_quantize(rows, fmt, evidence=evidence(fmt, layer))
        again = expected.movedim(axes, tuple(range(len(axes)))).reshape(layer.rows, -1)
        check(same_bits(flat, again), fmt, layer, "rows of a weight round as others than a matrix of them")


def check_constants(fmt: Format) -> None:
    """Zeros stay zeros, all over or in some rows; constants stay near."""
    for layer, weight in cases(fmt):
        zeros = torch.zeros(layer.shape)
        for given in (zeros, -zeros):
            check(torch.equal(rounded(fmt, layer, given), zeros), fmt, layer, "zeros do not stay zeros")
        partly = weight.clone()
        partly.select(layer.row_axes[-1], 0).zero_()
        found = rounded(fmt, layer, partly).select(layer.row_axes[-1], 0)
        check(not found.any(), fmt, layer, "a row of zeros does not stay zero")
        for value in (1.0, -0.3, 0.0123, 77.0, 1.9999):
            found = rounded(fmt, layer, torch.full(layer.shape, value))
            near = float((found - value).abs().max()) <= CONSTANT * abs(value)
            check(near, fmt, layer, f"constant {value} becomes {float(found.min())} to {float(found.max())}")


def check_energy(fmt: Format, layer: Layer, numbers: Tensor, found: Tensor) -> None:
    """Rounding keeps most of a weight."""
    lost = float((found.double() - numbers.double()).square().sum()) / float(numbers.double().square().sum())
    check(lost <= ENERGY, fmt, layer, f"loses {lost:.0%} of the squares of the weights")


def check_same_answer(fmt: Format) -> None:
    """Rounding answers the same each time."""
    for layer, weight in cases(fmt):
        found = rounded(fmt, layer, weight)
        check(same_bits(rounded(fmt, layer, weight.clone()), found), fmt, layer, "answers otherwise the second time")


def check_idempotent(fmt: Format) -> None:
    """Where the family says so, rounding twice changes nothing, bit for bit."""
    if not fmt.idempotent:
        return
    for layer, weight in cases(fmt, widths=2):
        for kind, numbers in awkward(weight).items():
            if kind in ("tiny", "denormal", "huge", "limit"):
                continue
            once = rounded(fmt, layer, numbers)
            check(same_bits(rounded(fmt, layer, once), once), fmt, layer, f"{kind} numbers change when rounded again")


def check_odd(fmt: Format) -> None:
    """Rounding ``-w`` gives the opposite of rounding ``w``. Only for grids that are symmetric."""
    for layer, weight in cases(fmt):
        for kind, numbers in awkward(weight).items():
            if kind not in ("huge", "limit"):
                opposite = rounded(fmt, layer, -numbers)
                check(torch.equal(-opposite, rounded(fmt, layer, numbers)), fmt, layer, f"{kind} numbers: not odd")


def check_evidence(fmt: Format) -> None:
    """A format that needs evidence says so when there is none."""
    if not fmt.needs:
        return
    layer, weight = cases(fmt)[0]
    for act in (quantize, fake_quantize):
        try:
            act(weight, fmt, layer.row_axes)
        except InputError as error:
            check(error.code == "E422", fmt, layer, f"without evidence it fails with {error.code}, not E422")
        else:
            check(False, fmt, layer, f"needs {fmt.needs} and rounds without")


#: What `check_format` runs.
CHECKS: tuple[Callable[[Format], None], ...] = (
    check_name, check_fit, check_bytes, check_codes, check_argument, check_strides, check_constants, check_same_answer,
    check_idempotent, check_evidence,
)  # fmt: skip


def check_format(fmt: Format, *, odd: bool = False) -> None:
    """Run every check on one format.

    Args:
        fmt: the format; of a KV cache, its numbers' format is checked as a weight's.
        odd: whether its grid is symmetric, so that ``-w`` must round to the opposite of ``w``.

    Raises:
        AssertionError: a law does not hold; the text names the format, the layer and the law.

    >>> check_format(Format.parse("bf16"), odd=True)
    """
    number: Any = getattr(fmt, "number", None)
    if isinstance(number, Format) and not fmt.refuses(Layer("k", "kv_cache", (2, 1024))):
        check_name(fmt)
        check(bool(fmt.refuses(Layer("fc", "linear", (8, 1024)))), fmt, None, "takes a weight")
        check_format(number)
        return
    for law in (*CHECKS, *((check_odd,) if odd else ())):
        law(fmt)


def check_family(formats: Sequence[Format]) -> None:
    """More bits never take fewer bytes, among formats of a family that differ in nothing else.

    Args:
        formats: formats of one family, dataclasses with a field ``bits``; others pass.
    """
    alike: dict[str, list[Format]] = {}
    for fmt in formats:
        fields = {name: getattr(fmt, name) for name in getattr(type(fmt), "__dataclass_fields__", ())}
        if "bits" in fields:
            rest = {name: value for name, value in fields.items() if name != "bits"}
            alike.setdefault(repr(sorted(rest.items())), []).append(fmt)
    for group in alike.values():
        for fewer, more in pairwise(sorted(group, key=lambda fmt: fmt.bits)):
            for layer in shapes():
                if not fewer.refuses(layer) and not more.refuses(layer):
                    law = f"takes fewer bytes than {fewer}"
                    check(more.bytes(layer) >= fewer.bytes(layer), more, layer, law)
                    check(math.isfinite(float(more.effective_bits(layer))), more, layer, "has no effective bits")
