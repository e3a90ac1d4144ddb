"""One-bit keys for the KV cache of a transformer: rotate, keep the signs, attend.

The house, in the order in which data walks through it::

    models, corpus   a model and the text it is measured on
    capture          its keys, as attention sees them
    centering        what is taken off before the rotation, and given back after
    rotations, learn the rotation that brings the keys near the sign lattice
    lattice          the lattice that is brought near the keys: a basis that need not be a rotation
    bits, codec      one sign bit per coordinate, one scale per key
    kernels          attention on the bits as they lie, on a GPU and on a processor
    calibrate        from a model and a text to a codec file
    cache            a cache for ``generate()`` that stores bits: stores, packed_layer
    evaluate, cache_quality  what attention loses, and what a conversation loses
    memory, roofline what it costs in bytes, and what it can gain in time
    records, timing  how every number was made, and how times are compared
    claims, theorems what the paper says, and what came of it
    figures, explorer  what a reader looks at, and what a reader moves
"""

__version__ = "0.1.0"
