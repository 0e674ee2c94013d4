"""Triton decides at import whether it interprets: what needs its interpreter and what needs its compiler run in processes of their own.

The planted bugs start both."""

from fusedmoe.backends import INTERPRETED

collect_ignore = (
    ["test_budgets.py", "test_cuda_budgets.py", "test_cuda_extension.py", "test_executed.py", "test_model.py", "test_planted.py", "test_traffic.py"] if INTERPRETED else ["interpreted"]
)
