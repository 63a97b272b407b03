"""Evaluate a saved model: the program of `sparse-xmc evaluate`, with the experiments' heads."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sparse_xmc.cli.evaluate", run_name="__main__", alter_sys=True)
