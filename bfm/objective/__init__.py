"""Negative sampling and the sampled softmax.

The way of an item to its rank, in the order to read it:

    item -> vector      bfm/model: fields.py (tokens), embedder.py (one vector), batch.py (once per group)
    history -> query    bfm/model: contextualizer.py, blocks.py, attention.py
    query -> mixture    bfm/model: mixture.py (the softmax beside pointer and neighbours)
    query -> loss       objective.py (a group's candidates), sampling.py (draws and their pi), softmax.py (formula),
                        tiled.py, fused.py, frozen.py (the same sum in flat memory, on a GPU, over ranks)
    query -> rank       bfm/ranking: queries.py (contexts), mixed_scores.py (the mixture as scores), ranks.py,
                        evaluate.py
"""
