"""Ours beside what a user would take instead, on one machine, in turn: `python -m benchmarks.peers` (`make bench`).

One file per contender runs in the contender's own environment and measures the same steps (worker.py); rounds.py runs them one
after another, round after round; report.py makes the tables, with each figure's share of what the machine allows (limits.py).
"""
