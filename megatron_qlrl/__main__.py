"""`python -m megatron_qlrl`; the guard matters: checkpoint writers are spawned and import this."""

from megatron_qlrl.cli import main

if __name__ == "__main__":
    main()
