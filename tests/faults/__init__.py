"""Each promise of the README under its fault; README's table tells which test shows which.

``GENVM_FAULTS=long`` in the environment makes the repeating tests go on for longer.
"""
