"""Several managers behind a real HAProxy, whose configuration is README's own text.

``python -m tests.cluster`` measures how many executions a second one and three managers do.
"""
