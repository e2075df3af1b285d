"""Weights on their way: from Hugging Face folders, to the engine, into checkpoints and releases.

One table (`hf_map.py`) serves all of them. Invariants: a checkpoint is whole or not there, reading
one runs nothing that it says (tests/dist_cpu/test_checkpoint.py, test_hostile_checkpoint.py), and
what goes out is bitwise what came in (tests/unit/weights/test_stream.py).
"""
