"""The main use of dropout on real data: ``python -m torchdrop demo``. Needs ``pip install 'torchdrop[demo]'``.

Handwritten digits are classified by a network with a keep_prob per layer and by the same network without dropout; then
the first predicts again with its dropout on, a hundred times (Monte Carlo inference). A regression on one input shows
where such a network is uncertain.
"""
