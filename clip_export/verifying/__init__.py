"""The proof that a user can show to others: every engine of a bundle, on everything that it can be asked.

    found = verify("engines/demo", pairs="demo")
    found.verdict, found.rows, found.runs[0].retrieval

`running.py` is the flow, `work.py` what one engine is asked, `asked.py` what can be; `results.py` is what is found, and
its JSON. `ranks.py` and `vectors.py` encode pairs and the inputs of an index, `zero_shot.py` names pictures, and
`report.py` makes a page of it all.
"""

from clip_export.verifying.asked import Asked
from clip_export.verifying.results import KEYS, EngineRun, Verification, write_json
from clip_export.verifying.running import verify
from clip_export.verifying.vectors import IndexInputs

__all__ = ["KEYS", "Asked", "EngineRun", "IndexInputs", "Verification", "verify", "write_json"]
