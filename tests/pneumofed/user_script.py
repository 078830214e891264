"""What a user writes, as a type checker sees it: `tests.pneumofed.test_typing` checks it strictly; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np

import pneumofed

bundle = pneumofed.open_bundle("bundle.zip")
one = bundle.predict(np.zeros((64, 64), np.uint8))
assert_type(one, pneumofed.ImageAnswer)
assert_type(one.probability, float | None)
assert_type(bundle.predict("a.png").status == "judged", bool)
assert_type(bundle.predict([Path("a.dcm"), Path("b.dcm")]), list[pneumofed.ImageAnswer])
why = pneumofed.explain(bundle, "a.png", "occlusion")
assert_type(why.trusted, bool | None)
run = pneumofed.simulate(hospitals=4, rounds=3, set={"training.learning_rate": 1e-3}, progress=print)
assert_type(run.export(), pneumofed.ModelBundle)
assert_type(pneumofed.open_run(run.folder).report, Path)

pneumofed.simulate(hospital=4)  # type: ignore[arg-type]
pneumofed.simulate(engine="flwr")  # type: ignore[arg-type]
pneumofed.open_bundel("bundle.zip")  # type: ignore[attr-defined]
