"""The subcommands of `jax-engine`, one file each, with `run(argv) -> exit code`."""
