"""``python -m spikeattn``: versions, devices, and which backend each operation takes."""

from spikeattn import backend_report

print(backend_report())
