"""Blocks of code in the documents, and a folder in which those of one page run in order."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mpsearch.cli.main import run

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n+)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TEXT = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "goes",
    "home",
    "to",
    "sleep",
)


@dataclass(frozen=True)
class Block:
    """A block of a page; ``reason`` says why it is not run, and is empty where it is."""

    page: Path
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str = "") -> list[Block]:
    text = text or page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start(2)].count("\n") + 1, found[2].strip(), found[3], found[1] or "")
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[str]:
    """The lines of a block for a shell, those that go on joined, without remarks."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


def make_model(folder: Path) -> None:
    """A random Llama of one large block, wide enough for any format, with the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mpsearch.bundled import bundled_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16384, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)


class Kitchen:
    """A folder where the blocks of one page run.

    Args:
        folder: what the blocks take for the current one.
        capsys: takes what they print.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "page"}
        self.out = ""
        self._capsys = capsys

    def cook(self, block: Block) -> None:
        """Run one block.

        Raises:
            AssertionError: a command that ends with anything but 0, or a language that nobody runs.
        """
        getattr(self, f"_{block.language}")(block)

    def _python(self, block: Block) -> None:
        exec(compile(block.text, str(block), "exec"), self.names)
        self.out += self._capsys.readouterr().out

    def _toml(self, block: Block) -> None:
        found = tomllib.loads(block.text)
        name = "study.toml" if "model" in found else "rules.toml"
        (self.folder / name).write_text(block.text, encoding="utf-8")

    def _sh(self, block: Block) -> None:
        lines = list(commands(block.text))
        if any(re.search(r"&\s*(#|$)|\$\(", line) for line in lines):
            self.bash("\n".join(["set -e", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT", *lines]), block)
            return
        for line in lines:
            words = shlex.split(line, comments=True)
            if words[0] == "mpsearch":
                self._mpsearch(words[1:], block)
            else:
                self.bash(line, block)

    def _mpsearch(self, words: list[str], block: Block) -> None:
        target = None
        if ">" in words:
            target = self.folder / words[words.index(">") + 1]
            words = words[: words.index(">")]
        code = run(words)
        out, err = self._capsys.readouterr()
        assert code == 0, f"{block}: mpsearch {shlex.join(words)} ended with {code}\n{out}\n{err}"
        if target:
            target.write_text(out, encoding="utf-8")
        self.out += out

    def bash(self, script: str, block: Block, **environment: str) -> None:
        """Run a script in a process of its own, with this Python's programs first."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, env={**os.environ, "PATH": path, **environment},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}: {script}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        self.out += done.stdout


def lines_of_text(count: int) -> str:
    """Text with a seed: any is good enough, as the model is random."""
    import random

    draw = random.Random(0)
    return "\n".join(" ".join(draw.choices(_TEXT, k=12)) for _ in range(count))
