"""Reading, writing and encoding data sets for extreme classification."""

from sparse_xmc.data.dataset import Dataset, Points
from sparse_xmc.data.dense import read_dense
from sparse_xmc.data.filters import read_filter
from sparse_xmc.data.storage import load_csr, save_csr
from sparse_xmc.data.text import LabelEncoder, TextEncoder
from sparse_xmc.data.tsv import iterate_tsv, read_tsv, write_tsv
from sparse_xmc.data.xmc_text import (
    iterate_xmc_text,
    read_xmc_labels,
    read_xmc_text,
    write_xmc_labels,
    write_xmc_text,
)

__all__ = [
    "Dataset",
    "LabelEncoder",
    "Points",
    "TextEncoder",
    "iterate_tsv",
    "iterate_xmc_text",
    "load_csr",
    "read_dense",
    "read_filter",
    "read_tsv",
    "read_xmc_labels",
    "read_xmc_text",
    "save_csr",
    "write_tsv",
    "write_xmc_labels",
    "write_xmc_text",
]
