"""How ``python -m batch_invariant_ops tune`` finds a card's tile table.

For each shape and number of rows: :mod:`.candidates` names the tiles worth trying, :mod:`.pool` compiles them on all
cores, :mod:`.measuring` compares their bits and times them on the GPU in a process that may be killed,
:mod:`.search` keeps the fastest, :mod:`.journal` remembers, and :mod:`.bands` makes the table of it.
"""
