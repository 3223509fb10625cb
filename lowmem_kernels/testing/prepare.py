"""All patches of Triton's interpreter at once."""

from __future__ import annotations

from . import fast_interpreter, interpreter


def prepare_interpreter() -> None:
    """Make the interpreter compute as a GPU does, and in less time; see `interpreter` and `fast_interpreter`.

    Call it before kernels run. It stays for the life of the process and matters only under TRITON_INTERPRET=1.
    """
    interpreter.install_approximate_roots()
    interpreter.install_fast_calls()
    interpreter.install_fp32_arguments()
    interpreter.install_round_to_nearest()
    fast_interpreter.install_fast_operations()
