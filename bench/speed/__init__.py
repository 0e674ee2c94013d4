"""Times the fused layers against everything a user could pick instead.

`bench/` and `python -m fusedmoe bench` share it; it is installed as `fusedmoe.speed`. One file a
concern:

- `subjects`: the layers and their rows; `calls`: inference and training step;
- `arms`: ours and PyTorch's; `restructured`: the network rewritten by hand;
- `runtimes` and `worker`: other people's runtimes, each in a process of its own;
- `parity`: nothing wrong is timed; `measuring`: the arms take turns;
- `case`: a layer, a batch and a mode, with its arms; `grids`: which cases;
- `memory`, `machine`, `overhead`: what else is measured;
- `results`: records and ratios; `own_model`: a model of the user's; `command`: the command line.
"""
