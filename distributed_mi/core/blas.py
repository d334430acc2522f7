"""The library behind matrix products in compiled code (numba takes scipy's), kept to the thread that calls it.

Kernels are given to threads by `core.cpu.map_slices`; a library that starts threads of its own in each of them would
have several for each core.
"""

import functools


@functools.cache
def use_one_thread() -> None:
    """Keep scipy's BLAS to the calling thread, for the rest of this process. That of numpy keeps its threads."""
    import scipy.linalg.cython_blas  # noqa: F401 - loads it
    from threadpoolctl import ThreadpoolController

    for library in ThreadpoolController().lib_controllers:
        if library.user_api == "blas" and "numpy" not in library.filepath:
            library.set_num_threads(1)
