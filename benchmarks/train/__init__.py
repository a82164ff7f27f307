"""Training of the small but true checkpoints in ``tests/checkpoints``, and the data sets they are judged by.

``scenes`` and ``easyvqa`` need no torch; everything else here does.
"""
