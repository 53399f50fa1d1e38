"""A seeded soak: clients that do everything at once to a real manager, and a model of it.

``python -m tests.soak --seconds 1800 --busy 2`` runs it; ``plans`` knows what each run writes and
comes to, ``driver`` does things to the manager and checks that all is as it should be, ``client``
is how it talks to the manager, ``latency`` is the process that measures ``GET /status``.
"""
