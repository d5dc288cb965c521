"""The script beside an exported ONNX model, which needs onnxruntime and numpy alone."""

RUN = '''\
"""Let the model beside this file write on: greedily, with its cache.

    python run.py --tokens 1,2,3 [--new 32] [--threads 1]
    python run.py --prompt "Once upon a time"

Needs onnxruntime and numpy; for --prompt also tokenizers, and tokenizer.json beside this file.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser()
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt")
    given.add_argument("--tokens", type=lambda text: [int(token) for token in text.split(",")])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load(threads):
    """Load the model and an empty cache for one sequence."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    cache = {
        given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()
        if given.name != "input_ids"
    }
    return session, cache


def main():
    """Write on, and say how fast."""
    args = arguments()
    tokenizer = None
    if args.prompt is not None:
        if not (HERE / "tokenizer.json").is_file():
            sys.exit("there is no tokenizer.json beside this file; give --tokens")
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokens = tokenizer.encode(args.prompt).ids if tokenizer else args.tokens
    if not tokens:
        sys.exit("nothing to begin with")
    session, cache = load(args.threads)
    names = [made.name for made in session.get_outputs()]
    step, made, seconds = tokens, [], []
    for _ in range(max(args.new, 1)):
        begin = time.perf_counter()
        found = dict(zip(names, session.run(None, {"input_ids": np.array([step], np.int64), **cache})))
        seconds.append(time.perf_counter() - begin)
        made.append(int(found["logits"][0, -1].argmax()))
        step = made[-1:]
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    print(tokenizer.decode(made) if tokenizer else ",".join(map(str, made)))
    print(f"{len(tokens)} tokens in {seconds[0]:.4f} s", file=sys.stderr)
    if seconds[1:]:
        print(f"then {len(seconds[1:]) / sum(seconds[1:]):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
'''
