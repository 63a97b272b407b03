"""Print the planned memory of training: the program of `sparse-xmc plan`, with the experiments' heads."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sparse_xmc.cli.plan", run_name="__main__", alter_sys=True)
