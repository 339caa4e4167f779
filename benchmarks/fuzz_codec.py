"""Wrong messages against the codec and the upload check: no crash, and nothing accepted that its manifest does not say.

    python benchmarks/fuzz_codec.py                          # 200,000 messages
    python benchmarks/fuzz_codec.py --inputs 5000 --seed 3

A good upload is changed in one to three places: values of its manifest, characters of it, bytes of its payload, its
length; half of them get a right size and hash again, as a liar would give them. Each is decoded and checked as the
server does. Whatever is accepted is encoded again and must come out as the same bytes under the same names, shapes,
dtypes and numbers.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.engines.flower.mutations import attempt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator, started = random.Random(options.seed), time.perf_counter()
    outcomes = Counter(attempt(generator) for _ in range(options.inputs))
    seconds = time.perf_counter() - started
    said = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{options.inputs:,} inputs of seed {options.seed} in {seconds:.0f} s: {said}; none crashed, none lied")


if __name__ == "__main__":
    main()
