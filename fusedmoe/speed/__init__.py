"""Times the fused layers against everything a user could pick instead: shared by `bench/` and `python -m fusedmoe bench`.

One file a concern: `subjects` (the layers and their rows), `calls` (inference and training step), `arms` (ours and PyTorch's), `runtimes`
and `worker` (other people's runtimes, each in a process of its own), `parity` (nothing wrong is timed), `case` (a layer, a batch, a mode,
with its arms), `measuring` (the arms take turns), `memory`, `machine`, `overhead`, `grids` (which cases), `results` (records and
ratios), `own_model`, `command`.
"""
