"""`shiftrm evaluate best-of-n`: gold score of the best of n samples by a reward model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shiftrm.cli.checks import output_file
from shiftrm.cli.options import About, inputs, option, optional
from shiftrm.cli.output import print_tables, write_numbers
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_bytes, together

EPILOG = """examples:
  shiftrm evaluate best-of-n --samples samples.jsonl --proxy models/reward \\
      --gold models/large-reward --output best_of_n.json
  shiftrm evaluate best-of-n --samples samples.jsonl --proxy models/reward --gold gold \\
      --n 1,4,16,64,256 --output best_of_n.json
  shiftrm evaluate best-of-n --samples scored.jsonl --proxy column:rewards --gold column:gold \\
      --output best_of_n.json

Rows are {"prompt", "responses": [...], "finished"?}, as `shiftrm sample` writes them, the more
responses the better, or {"prompt", "response"}; rows with the same prompt are put together. From N
samples per prompt every n up to N is estimated without bias and without sampling again. Scores that
are in the file already need no model: a list of numbers beside `responses` (or instead of them).
Beside FILE.json the picture FILE.png is written.
"""

ABOUT = About(
    help="proxy and gold of the best of n responses, against KL",
    description="Lets a proxy reward model choose the best of n samples, and reports the "
    "gold reward of the choice as n, and with it the KL, grows.",
    epilog=EPILOG + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    samples: str = option("DATA", "see below", reads=True)
    proxy: str = option(
        "MODEL",
        "reward model that chooses: folder, hub name or column:NAME",
        default="column:proxy",
        reads=True,
    )
    gold: str = option(
        "MODEL",
        "judge of the choice: folder, hub name, column:NAME, or `gold` or `gold:WORLD`, a gold "
        "world's true reward",
        default="column:gold",
        reads=True,
    )
    n: str | None = optional(
        "N,N,...", "numbers of samples", shown="powers of two up to the number of samples"
    )
    output: str = option("FILE", "numbers, as JSON")
    batch_size: int = option("N", default=64, least=1)
    seed: int = option("N", "seed of the bootstrap", default=0)


def run(options: Options) -> None:
    from shiftrm.measure.best_of_n import best_of_n_curve
    from shiftrm.measure.best_of_n_files import count_samples, score_samples

    ns = _numbers(options.n)
    output, picture = _outputs(options.output, inputs(options))
    models = (options.proxy, options.gold)
    columns = [o.removeprefix("column:") for o in models if o.startswith("column:")]
    total = count_samples(options.samples, columns=columns, texts=len(columns) < 2)
    only_on_terminals()
    proxy, gold = (_scores(model, options.batch_size) for model in models)
    with bar("scoring samples", total) as progress:
        scored = score_samples(options.samples, proxy, gold, progress=progress, total=total)
    fewest = min(map(len, scored.proxy))
    if ns is not None and max(ns) > fewest:
        raise UserError(
            f"--n {max(ns)}: a prompt has only {fewest} samples; sample more, or ask for less"
        )
    curve = best_of_n_curve(scored.proxy, scored.gold, n=ns, seed=options.seed)
    _write(output, picture, curve, options, left_out=scored.left_out)
    _show(curve, scored.left_out)
    print(f"Numbers: {output}\nPicture: {picture}")


def _outputs(option: str, inputs: list[str]) -> tuple[Path, Path]:
    output = output_file(option, apart_from=inputs)
    if output.suffix.lower() != ".json":
        raise UserError(f"{option}: the output is JSON; call it {output.stem}.json")
    return output, output_file(str(output.with_suffix(".png")), apart_from=inputs)


def _numbers(option: str | None) -> list[int] | None:
    if option is None:
        return None
    try:
        found = sorted({int(part) for part in option.split(",")})
    except ValueError:
        raise UserError(f"--n {option!r}: expected whole numbers with commas, as 1,4,16") from None
    if found[0] < 1:
        raise UserError(f"--n {found[0]}: it must be at least 1")
    return found


def _scores(option: str, batch_size: int) -> Any:
    from shiftrm.measure.best_of_n_files import column_scores, gold_world_scores, model_scores
    from shiftrm.models.scoring import Scorer
    from shiftrm.world.world import gold_world

    if option.startswith("column:"):
        return column_scores(option.removeprefix("column:"))
    if (world := gold_world(option)) is not None:
        return gold_world_scores(world)
    scorer = Scorer.from_pretrained(option).to_accelerator()
    return model_scores(scorer, option, batch_size=batch_size)


def _write(output: Path, picture: Path, curve: Any, options: Options, *, left_out: int) -> None:
    from shiftrm.measure.best_of_n import describe
    from shiftrm.report.best_of_n_plots import best_of_n_figure
    from shiftrm.report.plots import render

    content = {
        "samples_file": options.samples,
        "proxy_model": options.proxy,
        "gold_model": options.gold,
        **asdict(curve),
        "gold_fit": _fit(curve),
        "left_out": left_out,
        "summary": describe(curve),
    }
    image = render(best_of_n_figure(curve), format="png")  # before anything is written
    with together():
        atomic_write_bytes(picture, image)
        write_numbers(output, content)


def _fit(curve: Any) -> dict[str, Any] | None:
    """Fit Gao et al.'s form of gold over KL, relative to n = 1; None for too few points."""
    from shiftrm.measure.overoptimisation import fit

    first = curve.points[0]
    if first.n != 1:
        return None
    gold = [point.gold.value - first.gold.value for point in curve.points]
    found = fit([point.kl for point in curve.points], gold, form="bon")
    return None if found is None else asdict(found)


def _show(curve: Any, left_out: int) -> None:
    from shiftrm.measure.best_of_n import describe
    from shiftrm.report.tables import Table

    rows = tuple(
        (
            str(point.n),
            f"{point.kl:.2f}",
            str(point.proxy),
            f"{point.gold}{' *' if point.n == curve.peak else ''}",
        )
        for point in curve.points
    )
    title = f"Best of n, {curve.prompts} prompts"
    lines = [describe(curve)]
    if left_out:
        lines.append(f"! {left_out} rows left out: longer than a model's context.")
    print_tables([Table(title, ("n", "KL", "proxy", "gold"), rows, text_columns=0)], lines)
