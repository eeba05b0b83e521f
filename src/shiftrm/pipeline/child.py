"""The program that runs one job from a file: `python -m shiftrm.pipeline.child JOB ERROR`.

`launch` writes JOB; under `accelerate launch` every process gets the same one. If the job fails
with an error for the user, the first process writes it to ERROR.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.pipeline.jobs import from_plain
from shiftrm.pipeline.launch import perform

__all__ = ["main"]


def main(job_file: str, error_file: str) -> int:
    """Run the job and return the exit status: 0 if done, 2 for an error in `error_file`."""
    data = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        perform(from_plain(data["job"]), Path(data["output"]))
    except UserError as error:
        said: dict[str, Any] = {"message": str(error)}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = {"message": str(error), "errno": error.errno}
    else:
        return 0
    if os.environ.get("RANK", "0") == "0":
        print(f"shiftrm: error: {said['message']}", file=sys.stderr, flush=True)
        atomic_write_text(Path(error_file), json.dumps(said))
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
