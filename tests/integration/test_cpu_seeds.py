"""A seeded request's generator on a CPU: what was drawn for nothing is taken back, wherever the request has been."""

import torch

from batch_invariant_ops.integrations.cpu_seeds import Generators


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(generators: Generators, key: int) -> float:
    """As a sampler does it."""
    (generator,) = [one for at, one in generators.items() if at == key]
    return float(torch.empty(1).exponential_(generator=generator))


def stream(count: int) -> list[float]:
    generator = seeded()
    return [float(torch.empty(1).exponential_(generator=generator)) for _ in range(count)]


def test_draws_are_the_seeds():
    generators = Generators()
    generators[3] = seeded()
    assert [draw(generators, 3) for _ in range(4)] == stream(4)


def test_what_was_drawn_for_nothing_is_drawn_again():
    generators = Generators()
    generators[0] = seeded()
    found = []
    for kept in (False, False, True, True, False, True):
        value = draw(generators, 0)
        if kept:
            found.append(value)
        else:
            generator = generators.get(0)
            generator.set_offset(generator.get_offset() - 4)
    assert found == stream(3)


def test_a_request_that_moves_or_comes_back_goes_on():
    request = seeded()
    generators = Generators()
    generators[0] = request
    found = [draw(generators, 0)]
    generators[5] = generators.pop(0)
    found.append(draw(generators, 5))
    generators.pop(5, None)
    assert generators.pop(5, None) is None
    generators[1] = request
    assert [*found, draw(generators, 1)] == stream(3)


def test_one_request_takes_nothing_back_from_another():
    generators = Generators()
    generators[0], generators[1] = seeded(), seeded()
    first = [draw(generators, 0), draw(generators, 1)]
    generators.get(0).set_offset(-4)
    assert first == stream(1) * 2 and draw(generators, 1) == stream(2)[1]
