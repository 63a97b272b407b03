"""The native module for CUDA (csrc/cuda/module.cc), whose handlers `xla_ops._native.cuda` registers."""

ffi_version: tuple[int, int]

def registrations() -> dict[str, object]:
    """Return the handlers, as capsules by name."""

def workspace_bytes(
    handler: str,
    is_bfloat16: bool,
    batch: int,
    in_features: int,
    labels: int,
    fan_in: int,
    k: int,
    num_entries: int,
    num_columns: int,
    /,
) -> int:
    """Return the size of a handler's workspace in bytes (csrc/cuda/handlers.h)."""

def error_message(status: int, /) -> str:
    """Return the message for a CUDA error."""
