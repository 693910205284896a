"""T12: artifact and program together fit 16,000,000 bytes, decimal."""

from ..artifact.inspect import inspect
from .case import Case, Finding

NAME, TITLE, CONDITION = "T12", "Bytes", "budget"


def run(case: Case) -> Finding:
    if case.artifact is None:
        return Finding.not_run("there is no artifact")
    found = inspect(case.artifact)
    artifact, code, total, limit = (found[f"{name}_bytes"] for name in ("artifact", "code", "total", "limit"))
    detail = f"artifact {artifact:,} + program {code:,} = {total:,} of {limit:,} bytes"
    return Finding.of(total <= limit, detail, artifact=artifact, code=code, total=total, limit=limit)
