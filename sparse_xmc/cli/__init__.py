"""The command-line programs: `sparse-xmc run`, `predict`, `evaluate` and `plan`."""
