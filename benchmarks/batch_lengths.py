"""Token counts of a file of prompts and completions, as numbers without text: the shape of real batches.

    python benchmarks/batch_lengths.py FILE.jsonl[.gz] [--every 6] > benchmarks/data/alpaca_eval_lengths.csv

The tokenizer is a byte-level BPE of 32,000 tokens trained on the file itself, without a chat template. One row a
completion: prompt, completion (tokens, with the one that ends it).
"""

import argparse
import csv
import gzip
import json
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--every", type=int, default=6, help="keep each of this many completions")
    args = parser.parse_args()
    opened = gzip.open if args.file.suffix == ".gz" else open
    with opened(args.file, "rt") as lines:
        pairs = [(row["prompt"], text) for row in map(json.loads, lines) for text in row["completions"]]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), vocab_size=32000, show_progress=False)
    print(f"# tokens of {args.file.name}, each {args.every}th of {len(pairs)} completions; byte-level BPE of 32,000")
    writer = csv.writer(sys.stdout)
    writer.writerow(["prompt", "completion"])
    for prompt, completion in pairs[:: args.every]:
        writer.writerow([len(tokenizer.encode(prompt)), len(tokenizer.encode(completion)) + 1])


if __name__ == "__main__":
    main()
