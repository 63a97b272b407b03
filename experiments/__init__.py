"""Reproduction of the paper: data sets, sweeps, tables and measurements. Importing it registers its heads."""

from experiments import unstructured as unstructured  # --head=unstructured
