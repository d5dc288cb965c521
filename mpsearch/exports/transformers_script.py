"""Scripts beside an export that load a model with transformers, quantise it and save it."""

from __future__ import annotations

SCRIPT = "run.py"

_HEAD = '''"""@DOC@

    python run.py MODEL OUT [DEVICE]

MODEL is the folder of the original model@DEFAULT@, OUT a new folder,
DEVICE where to quantise, such as cuda; the CPU when it is left out.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
SOURCE = @SOURCE@
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)


def settings(name):
    """Read a file of the export."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def load(source, device, **more):
    """Load the model in its stored number type."""
    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, config.architectures[0])
    where = {"device_map": device} if device else {}
    return kind.from_pretrained(source, dtype="auto", **where, **more)


def beside(source, out):
    """Copy the tokenizer."""
    for name in BESIDE:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(out) / name)


def stop_if(wrong, what):
    """Say what is not as planned, and leave."""
    if wrong:
        shown = ", ".join(sorted(wrong)[:5])
        sys.exit(f"nothing was saved: {len(wrong)} modules, the first {shown}: {what}")


'''

_TAIL = '''

def main(arguments):
    """Quantise and save."""
    if len(arguments) not in (2, 3):
        sys.exit("usage: python run.py MODEL OUT [DEVICE]" + (f"\\nMODEL was {SOURCE}" if SOURCE else ""))
    source, out = arguments[:2]
    if Path(out).exists() and any(Path(out).iterdir()):
        sys.exit(f"{out} holds files; nothing was written")
    quantise(source, out, arguments[2] if len(arguments) == 3 else "")
    beside(source, out)


if __name__ == "__main__":
    main(sys.argv[1:])
'''


def script(title: str, body: str, source: str = "") -> str:
    """Return a script that quantises MODEL into OUT.

    Args:
        title: its first line.
        body: Python that defines ``quantise(source, out, device)``, which saves the model. It may use ``settings``,
            ``load`` and ``stop_if`` of the script.
        source: folder of the model when it is known.

    >>> "SOURCE = 'model'" in script("Quantise.", "def quantise(source, out, device): ...", "model")
    True
    """
    head = _HEAD.replace("@DOC@", title).replace("@DEFAULT@", " (SOURCE says which it was)" if source else "")
    # Escapes alone, so that a path can hold quotes and any character.
    return head.replace("@SOURCE@", ascii(source)) + body.strip("\n") + "\n" + _TAIL
