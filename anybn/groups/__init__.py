"""Groups of processes or devices whose batches count as one. `anybn.distributed` is the public name."""
