"""What the fused CPU kernels share. The only folder, with the ``cpu.py`` of each op, that imports numba.

`threads` and `memory` import no numba; every other module here does, so they are imported where a kernel is about to
run.
"""
