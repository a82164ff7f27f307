"""One command for a machine with a GPU and no network: parity and speed of every engine kind that the GPU supports.

    python -m benchmarks.gpu_check.pack                   here: wheels in pieces, and the kit (bundles, hollow models)
    python -m benchmarks.gpu_check --wheels DIR           there: everything, within --minutes
    python -m benchmarks.gpu_check --cpu                  anywhere: the same flow on the CPU provider, with a tiny model

Each step runs in a process of its own with a time limit of its own; what fails is recorded with its message and the run goes
on. Speed needs no trained weights, so the large models travel as graphs without weights (`hollow`), which are filled with
random numbers on arrival.
"""
