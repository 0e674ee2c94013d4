"""Triton decides at import whether it interprets: what needs its interpreter and what needs its
compiler run in processes of their own.

Mutants start both.
"""

from fusedmoe.backends import INTERPRETED

COMPILED = ("budgets", "cuda_budgets", "cuda_extension", "executed", "model", "mutants", "traffic")
collect_ignore = [f"test_{name}.py" for name in COMPILED] if INTERPRETED else ["interpreted"]
