"""The paper: labs, records, claims, figures and the explorer that the book is made of.

Imports the library ``signlattice``; the library imports nothing from here.
"""
