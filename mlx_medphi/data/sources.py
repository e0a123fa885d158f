"""Who made each data set, and under which licence; this travels with every derived file."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["attribution"]

_ATTRIBUTION = {
    "aci-bench": (
        "ACI-Bench: Yim, Fu, Ben Abacha, Snider, Lin, Yetisgen, Scientific Data 10:586, 2023. "
        "https://github.com/wyim/aci-bench, CC BY 4.0; changed: see prepare.json."
    ),
    "mts-dialog": (
        "MTS-Dialog: Ben Abacha, Yim, Fan, Lin, EACL 2023, pp. 2291-2302. "
        "https://github.com/abachaa/MTS-Dialog, CC BY 4.0; changed: see prepare.json."
    ),
    "primock57": (
        "PriMock57: Papadopoulos Korfiatis, Moramarco, Sarac, Savkov, ACL 2022 "
        "(arXiv:2204.00333). https://github.com/babylonhealth/primock57, CC BY 4.0; changed: see "
        "prepare.json."
    ),
    "synthetic": "Synthetic conversations and notes made by the mlx_medphi project, no patient.",
}


def attribution(sources: Iterable[str]) -> tuple[str, ...]:
    """One line for each known source, sorted by its name."""
    return tuple(_ATTRIBUTION[name] for name in sorted(set(sources)) if name in _ATTRIBUTION)
