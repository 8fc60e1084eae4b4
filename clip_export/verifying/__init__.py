"""The proof that a user can show to others: every engine of a bundle, on everything that it can be asked.

    found = verify("engines/demo", pairs="demo")
    found.verdict, found.rows, found.runs[0].retrieval

`running.py` is the flow; `results.py` what is found, and its JSON; `ranks.py` and `vectors.py` encode pairs and the
inputs of an index; `zero_shot.py` names pictures; `report.py` makes a page of it.
"""

from clip_export.verifying.results import KEYS, EngineRun, Verification, write_json
from clip_export.verifying.running import Asked, IndexInputs, verify

__all__ = ["KEYS", "Asked", "EngineRun", "IndexInputs", "Verification", "verify", "write_json"]
