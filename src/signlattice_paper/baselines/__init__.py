"""Caches and codes of other projects, by their published rules: to be measured beside ours.

A rule is a `Quantizer` that counts every scale, zero and norm in the width in which its authors
keep it. Where an implementation of theirs runs in transformers, `transformers_caches` takes that.
"""
