"""Passes from an fp32 graph to a strongly typed half one, and back to what that one computes.

    ranges.measure      what every tensor of the fp32 graph holds on real inputs
    half.convert        the half graph: all that fits in half, the rest fp32, with casts between them and a report
    refine.refine       the same, with as many first blocks in fp32 as a contract on the outputs takes
    simulate.simulate   the half graph as an fp32 graph with every rounding written out, for a CPU

and from there to one whose linear layers multiply 8-bit numbers:

    calibrate.calibrate   ranges, and rows of what each layer reads, in one pass over real inputs
    treat.treat           of one layer: how strongly it is smoothed, and the scale of its input
    smooth.smooth         the fp32 graph with the smoothing folded in, and the function that it had
    quantize.quantize     the half graph with chosen layers in int8 or fp8
    switchable.switchable the simulation of all mixes of such layers at once
    search.search         the largest mix that keeps a contract
    cpu.quantize_for_cpu  int8 for ONNX Runtime's own kernels

Nothing here knows CLIP: graphs, and feeds for them, are all that these modules see.
"""
