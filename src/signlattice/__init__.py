"""One-bit keys for the KV cache of a transformer: rotate, keep the signs, attend.

The house, in the order in which data walks through it::

    models, corpus   a model and the text it is measured on
    capture          its keys, as attention sees them
    centering        what is taken off before the rotation, and given back after
    rotations, learn the rotation that brings the keys near the sign lattice
    bits, codec      one sign bit per coordinate, one scale per key
    kernels          attention on the bits as they lie, on a GPU and on a processor
    evaluate         what attention loses
    memory, roofline what it costs in bytes, and what it can gain in time
    records, timing  how every number was made, and how times are compared
    claims, theorems what the paper says, and what came of it
    figures, explorer  what a reader looks at, and what a reader moves
"""

__version__ = "0.1.0"
