"""The native module for CPUs (csrc/cpu/module.cc), whose handlers `xla_ops._native.cpu` registers."""

ffi_version: tuple[int, int]

def registrations() -> dict[str, object]:
    """Return the handlers, as capsules by name."""

def scratch_bytes(
    handler: str, is_bfloat16: bool, batch: int, in_features: int, num_entries: int, num_threads: int, /
) -> int:
    """Return the scratch memory of a fixed fan-in handler in bytes (csrc/cpu/scratch.h)."""

def peak_scratch_bytes() -> int:
    """Return the most scratch memory that all calls together ever held, in bytes."""

def isa() -> str:
    """Return the name of the instruction set in use: "baseline", "avx2" or "avx512"."""

def select_isa(name: str, /) -> None:
    """Use another instruction set.

    Raises:
      ValueError: the instruction set is not in this build, or not on this processor.
    """
