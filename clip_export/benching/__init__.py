"""How fast a bundle is on this machine, beside what else could run the model, and how far that is from the limit.

    entrants.py       who takes part: the bundle's engines, and the same model in torch and transformers
    batches.py        what they are given: batches of golden pictures and of texts
    timing.py         interleaved rounds, as many as the median needs
    limits.py         the arithmetic of a graph, and the fastest matrix product of this machine
    fresh.py          what opening takes, in a process of its own: time, memory (memory.py)
    end_to_end.py     from files and strings to embeddings, stage by stage; advice.py says what binds
    measuring.py      all of it: `bench`
    results.py        what was measured, and as JSON; table.py and chart.py show it to people

Speeds are compared only where all give the same embeddings: each is held to the first at every batch.
"""
