"""Reading, writing and encoding data sets for extreme classification."""

from sparse_xmc.data.formats import (
    Dataset,
    iterate_xmc_text,
    read_dense,
    read_filter,
    read_tsv,
    read_xmc_labels,
    read_xmc_text,
    write_tsv,
    write_xmc_labels,
    write_xmc_text,
)
from sparse_xmc.data.storage import load_csr, save_csr
from sparse_xmc.data.text import LabelEncoder, TextEncoder

__all__ = [
    "Dataset",
    "LabelEncoder",
    "TextEncoder",
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
