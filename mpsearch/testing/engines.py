"""What every engine must do. Subclass `EngineSuite`, or `RunningEngineSuite` for one that runs here, and use pytest."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mpsearch.format import Format, Joined, all_formats
from mpsearch.hardware.child import time_kernel
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.kernel import Engine, Kernel
from mpsearch.layer import Layer

KINDS = ("linear", "embedding")
#: Rows and columns: whole blocks, one row, and numbers that no block divides.
SHAPES = ((64, 128), (96, 512), (1, 256), (33, 96), (33, 48), (31, 127), (7, 7))
TOKENS = (1, 3, 40)
#: Beside the examples of all families: bits and groups side by side, and inputs that engines round.
_MORE = (
    *(f"int{bits}-g{group}{grid}" for bits, group, grid in itertools.product((2, 3, 4, 8), (32, 64), ("", "-asym"))),
    "int4-channel", "int8-channel-asym", "int8-channel-full", "int8-channel@int8-token",
    "int8-channel@int8-tensor-asym", "int8-channel@int8-tensor-asym-static", "fp8-e4m3-channel@fp8-e4m3-token",
)  # fmt: skip
_SENTENCE = 300
_TASKS = Path("/proc/self/task")
#: Processor seconds in which threads show: they are counted in hundredths.
_WORK = 0.4
#: Share of the work that one thread does at least, where it is alone.
_MOST = 0.75
_PURE = """
import json, sys
from mpsearch import registry
from mpsearch.hardware.kernel import Kernel
asked = json.load(sys.stdin)
module, _, name = asked["engine"].partition(":")
engine = getattr(__import__(module, fromlist=[name]), name)(**asked["settings"])
found = [engine.refuses(Kernel(**kernel)) for kernel in asked["kernels"]]
print(json.dumps([found, sorted(set(asked["libraries"]) & set(sys.modules))]))
"""


def formats() -> tuple[str, ...]:
    """Names of formats of every family of weights, and some more that engines may know."""
    examples = [str(fmt) for name, family in all_formats().items() if name != "kv" for fmt in family]
    return tuple(dict.fromkeys([*examples, *Joined.examples, *_MORE]))


def kernels(tokens: tuple[int, ...] = TOKENS, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[Kernel]:
    """Yield kernels of every format, kind and shape."""
    for fmt, kind, shape, rows in itertools.product(formats(), KINDS, shapes, tokens):
        yield Kernel.of(kind, *shape, fmt, rows)


def fits(kernel: Kernel) -> bool:
    """Whether a layer of this shape can take the format: no engine is asked for one that cannot."""
    return not Format.parse(kernel.format).refuses(Layer("layer", kernel.kind, (kernel.rows, kernel.columns)))


class EngineSuite:
    """The behaviour of an engine that need not be installed.

    A subclass overrides the fixture `engine`.

    Attributes:
        libraries: modules that answering must not load.
    """

    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime", "openvino", "torchao", "gguf")

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine under test: a frozen dataclass."""
        raise NotImplementedError

    def test_says_what_it_is(self, engine: Engine) -> None:
        """Its attributes are of their kinds, and equal settings make equal engines."""
        assert engine.name
        assert isinstance(engine.extra, str)
        assert engine.device in ("cpu", "cuda")
        assert isinstance(engine.fuses, bool)
        assert engine.cache_bits in (4, 8, 16, 32)
        assert isinstance(engine.missing(), str)
        assert engine == dataclasses.replace(engine)  # type: ignore[type-var]
        assert hash(engine) == hash(dataclasses.replace(engine))  # type: ignore[type-var]

    def test_answers_for_every_kernel(self, engine: Engine) -> None:
        """A refusal is one sentence, the same each time; something is taken."""
        found = {kernel: engine.refuses(kernel) for kernel in kernels()}
        assert found == {kernel: engine.refuses(kernel) for kernel in kernels()}
        for kernel, reason in found.items():
            assert isinstance(reason, str), kernel
            assert "\n" not in reason, kernel
            assert len(reason) < _SENTENCE, kernel
        assert any(not reason for kernel, reason in found.items() if kernel.kind == "linear")

    def test_answers_without_its_library(self, engine: Engine) -> None:
        """In a new process, refusals are the same, and no library is loaded for them."""
        asked = list(kernels((1,)))
        request = {
            "engine": f"{type(engine).__module__}:{type(engine).__qualname__}",
            "settings": settings(engine),
            "kernels": [dataclasses.asdict(kernel) for kernel in asked],
            "libraries": self.libraries,
        }
        done = subprocess.run(
            [sys.executable, "-c", _PURE], input=json.dumps(request), capture_output=True, text=True, check=True
        )
        reasons, loaded = json.loads(done.stdout)
        assert reasons == [engine.refuses(kernel) for kernel in asked]
        assert loaded == []

    def test_more_tokens_are_taken_too(self, engine: Engine) -> None:
        """What depends on the tokens says so."""
        for kernel in kernels((1,)):
            reasons = {engine.refuses(dataclasses.replace(kernel, tokens=tokens)) for tokens in TOKENS}
            assert len(reasons) == 1 or any("token" in reason for reason in reasons), kernel

    def test_bytes_are_bytes(self, engine: Engine) -> None:
        """Every weight takes some, as many for any number of tokens, and twice the rows take about twice as many."""
        for kernel in kernels():
            if engine.refuses(kernel) or not fits(kernel):
                continue
            size = engine.bytes(kernel)
            assert type(size) is int, kernel
            assert 0 < size <= 8 * (kernel.rows + 1) * (kernel.columns + 4), kernel
            assert size == engine.bytes(dataclasses.replace(kernel, tokens=kernel.tokens + 7)), kernel
            twice = dataclasses.replace(kernel, rows=2 * kernel.rows)
            assert engine.refuses(twice) or abs(engine.bytes(twice) - 2 * size) <= 8, kernel

    def test_bytes_grow_with_bits(self, engine: Engine) -> None:
        """Of integers that differ in bits alone, more bits take more bytes; none takes more than the widest float."""
        for kind, grain in itertools.product(KINDS, ("g32", "g64", "g64-asym", "channel")):
            sizes = [
                engine.bytes(kernel)
                for bits in (2, 3, 4, 8)
                if not engine.refuses(kernel := Kernel.of(kind, 64, 512, f"int{bits}-{grain}", 1))
            ]
            assert sizes == sorted(set(sizes)), (kind, grain)
            plain = [Kernel.of(kind, 64, 512, fmt, 1) for fmt in ("bf16", "fp16", "fp32")]
            whole = [engine.bytes(kernel) for kernel in plain if not engine.refuses(kernel)]
            assert not sizes or not whole or sizes[-1] < max(whole), (kind, grain)


class RunningEngineSuite(EngineSuite):
    """The behaviour of an engine that is installed here.

    Attributes:
        shapes: rows and columns of the kernels that run.
        tokens: tokens of the kernels that run.
    """

    shapes: ClassVar[tuple[tuple[int, int], ...]] = SHAPES
    tokens: ClassVar[tuple[int, ...]] = (1, 3)

    def test_is_installed(self, engine: Engine) -> None:
        """Nothing is missing, and there is a version of something."""
        assert engine.missing() == ""
        versions = engine.versions()
        assert versions
        assert all(isinstance(name, str) and name and text for name, text in versions.items())

    def test_what_is_taken_runs(self, engine: Engine) -> None:
        """Every kernel that is not refused loads, runs and takes some time."""
        ran = set()
        for kernel in kernels(self.tokens, self.shapes):
            if engine.refuses(kernel) or kernel in ran:
                continue
            ran.add(kernel)
            found = time_kernel(engine, kernel, clock=Clock(limit=0.005, least=3))
            assert found.status == "ok", (kernel, found.reason)
            assert 0 < found.low <= found.seconds <= found.high < 1, kernel
        assert {kernel.kind for kernel in ran} == set(KINDS)

    def test_copies_are_about_as_many_as_asked(self, engine: Engine) -> None:
        """A call goes through at least one copy, and through few more than asked."""
        kernel = self._some(engine, 1)
        for asked in (1, 4, 20):
            loaded = engine.load(kernel, asked, 1)
            loaded.call()
            assert 1 <= loaded.copies <= 2 * asked

    def test_one_thread_is_one_thread(self, engine: Engine) -> None:
        """After a kernel that had two threads, one thread alone does the work of one that has one."""
        if engine.device != "cpu" or not _TASKS.is_dir():
            pytest.skip("only Linux tells how much each thread of a process did")
        kernel = self._some(engine, 64)
        engine.load(kernel, 1, 2).call()
        call = engine.load(kernel, 1, 1).call
        call()
        time.sleep(0.2)  # threads of the first may spin for a while
        before, start = _ticks(), time.process_time()
        while time.process_time() - start < _WORK:
            call()
        done = {thread: ticks - before.get(thread, 0) for thread, ticks in _ticks().items()}
        assert max(done.values()) / os.sysconf("SC_CLK_TCK") > _MOST * (time.process_time() - start)

    def _some(self, engine: Engine, tokens: int) -> Kernel:
        """Some product that the engine takes."""
        found = (Kernel.of("linear", 512, 512, fmt, tokens) for fmt in ("fp32", "bf16", "int8-channel", *formats()))
        return next(kernel for kernel in found if not engine.refuses(kernel))


def settings(engine: Any) -> dict[str, Any]:
    """Settings of an engine, as its class takes them."""
    return {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine) if field.init}


def _ticks() -> dict[str, int]:
    """Thread of this process -> hundredths of a second that it had a processor."""
    found = {}
    for folder in _TASKS.iterdir():
        fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        found[folder.name] = int(fields[11]) + int(fields[12])
    return found
