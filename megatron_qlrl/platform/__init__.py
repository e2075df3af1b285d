"""What a process meets on its machine: devices, environment, files, locks, signals, hung steps.

`megatron_cpu.py` holds the only patches of foreign code: with them Megatron-core runs without a GPU
(tests/dist_cpu/test_policy_parity.py).
"""
