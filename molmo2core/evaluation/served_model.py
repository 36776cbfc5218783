"""The code of a registered model: MLflow stores this file with the version and runs it when the version is loaded."""

from molmo2core.evaluation.serving import load_answerer
from molmo2core.tracking.pyfunc_model import serve

serve(load_answerer)
