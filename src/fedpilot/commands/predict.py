"""What ``fedpilot predict`` does."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from fedpilot import display
from fedpilot.errors import ConfigError
from fedpilot.prediction import Prediction, Predictor


def predict(
    directory: Path,
    texts: Sequence[str],
    data: Path | None,
    *,
    client: str | None = None,
    which: Literal["best", "last"] = "best",
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Predictions on the screen or in a file.

    Raises:
        ConfigError: There are no inputs or two kinds of them, or the file would be of an unknown kind.
    """
    if bool(texts) == (data is not None):
        raise ConfigError(["inputs must be given as --text or as --data FILE, one of the two"])
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ConfigError([f"--out must end in .csv or .jsonl, got {out.name}"])
    predictor = Predictor.open(directory, client=client, which=which)
    found = predictor.texts(texts) if data is None else predictor.table(data)
    if out is not None:
        out.write_text(as_csv(found) if out.suffix == ".csv" and not as_json else as_lines(found), encoding="utf-8")
        display.console_for().print(f"{display.counted(len(found), 'prediction')} written to {out}", soft_wrap=True)
    elif as_json:
        print(as_lines(found), end="")  # noqa: T201 - for other programs, without wrapping
    else:
        display.console_for().print(as_table(found, texts))


def as_lines(found: Sequence[Prediction]) -> str:
    """One JSON object a line; what does not apply is left out."""
    return "".join(json.dumps(_filled(prediction), ensure_ascii=False) + "\n" for prediction in found)


def _filled(prediction: Prediction) -> dict[str, object]:
    if prediction.label is None:
        return {"continuation": prediction.continuation}
    return {"label": prediction.label, "probabilities": dict(prediction.probabilities)}


def as_csv(found: Sequence[Prediction]) -> str:
    """A header, then one row a prediction: the label and each class's probability, or the continuation."""
    text = io.StringIO()
    writer = csv.writer(text)
    classes = list(found[0].probabilities)
    writer.writerow(["label", *classes] if classes else ["continuation"])
    for prediction in found:
        shares = [f"{prediction.probabilities[name]:.6g}" for name in classes]
        writer.writerow([prediction.label, *shares] if classes else [prediction.continuation])
    return text.getvalue()


def as_table(found: Sequence[Prediction], texts: Sequence[str]) -> Table:
    """For the screen: the three likeliest classes of each input."""
    table = Table(show_header=True)
    for header in ("input", "prediction", "probabilities"):
        table.add_column(header, overflow="fold")
    for number, prediction in enumerate(found):
        likeliest = sorted(prediction.probabilities.items(), key=lambda entry: -entry[1])[:3]
        shares = ", ".join(f"{name} {share:.3f}" for name, share in likeliest)
        said = prediction.continuation if prediction.label is None else prediction.label
        cells = (texts[number] if texts else f"row {number + 1}", said or "", shares or "-")
        table.add_row(*map(Text, cells))  # a text's brackets are no markup
    return table
