"""`anybn.diagnose` and what it returns: why evaluation differs from training, layer by layer."""

from anybn.diagnosis.diagnose import diagnose
from anybn.diagnosis.findings import Finding
from anybn.diagnosis.layer import LayerDiagnosis
from anybn.diagnosis.report import Diagnosis

__all__ = ["Diagnosis", "Finding", "LayerDiagnosis", "diagnose"]
