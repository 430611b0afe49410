"""What the targets have in common: how atheris runs one, and how one is tried without it."""

import gc
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FunctionType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "vllm"), str(HERE.parent / "harness")]
Target = Callable[[bytes], None]
MOST_CHANGES = 4


def fuzz(target: Target, samples: Sequence[bytes]) -> None:
    """Run the target by atheris with the command line's options of libFuzzer, from these samples on."""
    try:
        import atheris
    except ImportError:
        name = Path(sys.argv[0]).stem
        print(f"{name}: atheris is not installed: `pip install atheris` is needed", file=sys.stderr)
        raise SystemExit(2) from None
    for function in gc.get_objects():  # all functions there are, as atheris.instrument_all() takes, are 20 s of work
        if isinstance(function, FunctionType) and str(function.__module__).startswith("determinism."):
            atheris.instrument_func(function)
    corpus = Path(tempfile.mkdtemp())
    for number, sample in enumerate(samples):
        (corpus / str(number)).write_bytes(sample)
    atheris.Setup([*sys.argv, str(corpus)], target)
    atheris.Fuzz()


def mutants(samples: Sequence[bytes], count: int, seed: int = 0) -> Iterator[bytes]:
    """The samples themselves, then as many changed ones: bytes replaced, left out, repeated, or from another sample."""
    yield from samples
    generator = random.Random(seed)
    for _ in range(count):
        data = bytearray(generator.choice(samples))
        for _ in range(generator.randint(1, MOST_CHANGES)):
            start, end = sorted(generator.choices(range(len(data) + 1), k=2))
            end = min(end, start + generator.choice((0, 1, 8, 64)))
            other = generator.choice(samples)
            place = generator.randrange(len(other) + 1)
            data[start:end] = generator.choice(
                (b"", bytes([generator.randrange(256)]), data[start:end] * 2, other[place:])
            )
        yield bytes(data)
