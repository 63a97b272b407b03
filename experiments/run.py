"""Train and evaluate one classifier: the program of `sparse-xmc run`, with the experiments' heads."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sparse_xmc.cli.run", run_name="__main__", alter_sys=True)
