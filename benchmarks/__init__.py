"""What the guard costs against its alternatives: `make bench`."""

import inferenceguard  # noqa: F401 - before torch, which reads at its import what this sets for OpenMP
