"""Predict labels of new points: the program of `sparse-xmc predict`, with the experiments' heads."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sparse_xmc.cli.predict", run_name="__main__", alter_sys=True)
