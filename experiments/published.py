"""Published results: the paper's tables, and encoders trained end to end on raw text."""

import csv
from pathlib import Path

_DIRECTORY = Path(__file__).parent / "paper"
END_TO_END = _DIRECTORY / "end_to_end.csv"


def read_paper() -> dict[tuple[str, str], dict[str, str]]:
    """Read the paper's rows, by our names of the data set and the model."""
    with open(_DIRECTORY / "reported_results.csv", encoding="utf-8", newline="") as file:
        return {(_data_name(row), _model_name(row)): row for row in csv.DictReader(file)}


def _data_name(row: dict[str, str]) -> str:
    return f"{row['dataset']}_{row['features']}".lower()


def read_end_to_end() -> dict[str, list[dict[str, str]]]:
    """Read published results of encoders trained end to end, by our names of the raw text."""
    found: dict[str, list[dict[str, str]]] = {}
    with open(END_TO_END, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = row["dataset"].lower()
            found.setdefault(name if name.startswith("lf-") else f"raw_{name}", []).append(row)
    return found


def _model_name(row: dict[str, str]) -> str:
    width = int(row["intermediate"])
    parts = [row["output_layer"]]
    if row["output_layer"] == "bottleneck":
        parts.append(str(width))
    elif row["output_layer"] != "dense":
        parts.append(row["fan_in"])
        if width:
            parts.append(f"{width // 1024}k" if width % 1024 == 0 else f"{width // 1000}k")
    if row["loss"] != "squared_hinge":
        parts.append(f"loss_{row['loss']}")
    return "_".join(parts)
