"""Passes from an fp32 graph to a strongly typed half one, and back to what that one computes.

    ranges.measure      what every tensor of the fp32 graph holds on real inputs
    half.convert        the half graph: all that fits in half, the rest fp32, with casts between them and a report
    refine.refine       the same, with as many first blocks in fp32 as a contract on the outputs takes
    simulate.simulate   the half graph as an fp32 graph with every rounding written out, for a CPU

Nothing here knows CLIP: graphs, and feeds for them, are all that these modules see.
"""
