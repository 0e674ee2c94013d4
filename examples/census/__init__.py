"""The main job: one multi-task model trained twice from one seed, plain and fused.

Run `python -m fusedmoe demo`; installed as `fusedmoe.demo`.
"""
