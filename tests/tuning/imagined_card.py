"""A card that is not there, for the tests of tuning: it injects times and faults, all else is the command's own."""

from batch_invariant_ops.tiles import FORMS, SAFE
from batch_invariant_ops.tuning.candidates import Card
from batch_invariant_ops.tuning.search import OtherBits, Unfit

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * 1024, "580.1", "2.11.0", "3.6.0", "130202", "abc")


def cost(tile, m):
    """Microseconds on a surface with one lowest place at each M; the fixed tile is 10 times as slow as any."""
    if tile == SAFE:
        return 1000.0
    best = min(128, max(16, m))
    off = abs(tile.m.bit_length() - best.bit_length()) + abs(tile.n - 64) / 64 + abs(tile.k - 64) / 64 + tile.swap
    off += 0.1 * (tile.follows != (m <= 16))
    return 10 + off + tile.warps / 8 + tile.stages / 32 + tile.group / 1024 + FORMS.index(tile.form) / 8192


class Bench:
    """Stands where :class:`batch_invariant_ops.tuning.bench.Bench` does.

    Args:
        unfit: whether a tile fails at M.
        other: whether a tile gives other bits.
        stop: called before each measurement.
        room: the largest M for which there is memory.
    """

    def __init__(self, unfit=lambda tile, m: False, other=lambda tile: False, stop=lambda: None, room=2**31):
        self.card, self.unfit, self.avoid = H100, {}, lambda tile, why: None
        self.fails, self.other, self.stop, self.room = unfit, other, stop, room
        self.measured, self.shapes, self.closed = [], [], False

    def foresee(self, point, tiles):
        pass

    def shape(self, largest):
        from batch_invariant_ops.tuning.bench import OutOfMemory

        if largest.m > self.room:
            raise OutOfMemory(f"N={largest.n} K={largest.k}: too little memory for M = {largest.m}")
        self.shapes.append(largest)

    def point(self, point, tiles, seconds):
        self.at = point
        return list(tiles), 0

    def measure(self, tile, rounds):
        self.stop()
        self.measured.append((self.at, tile))
        if self.other(tile):
            raise OtherBits(f"{tile} at {self.at}: 3 elements differ")
        if self.fails(tile, self.at.m):
            raise Unfit("it does not launch")
        return cost(tile, self.at.m)

    def over_vendor(self, tile):
        """The vendor takes 12 µs at every M, with its second kernel at M = 8, and has other bits at M = 2."""
        return None if self.at.m == 2 else (cost(tile, self.at.m) / 12, int(self.at.m == 8))

    def close(self):
        self.closed = True
