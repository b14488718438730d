"""What the pages of a report, a study and a benchmark have in common: templates, figures, and the part that shows pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidali.report.class_figures import class_accuracy, confusion_matrix
from tidali.report.drawing import inline_svg, theme_css
from tidali.training.uncertainty import standard_error_percent

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from tidali.report.insight import Insight

_TEMPLATES = Path(__file__).parent
_PAIRS, _PICTURES_OF_A_PAIR, _HARDEST = 10, 4, 12
MATRIX_CLASSES = 250
"""With more classes, the cells of a confusion matrix would be smaller than two pixels, so it is left out."""

BEST_IS_BIASED = (
    "“Best” is the epoch with the highest accuracy on these same samples, so it looks better than it is: compare “last”."
)


_OPTION = re.compile(
    r"<(style|title|svg|code)\b.*?</\1>|<[^>]*>"
    r"|(?<![\w-])--\w[\w-]*(?: (?:[\w.]+=[\w.]*\w|[A-Z]{2,}(?:[\w./]*\w)?\b|\d[\w.]*\b))?",
    re.DOTALL,
)
"""An option in a page's text with its value, such as --repeats 5; or, so that no option is found there, markup or code."""


def render(template: str, folder: Path | None = None, **context: Any) -> bytes:
    """Fill in a template. All values are escaped unless they are `Markup`. No line breaks inside an option.

    Args:
        folder: where the template is, if it is not one of this package's. It may import those.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder or _TEMPLATES, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(theme=as_is(theme_css()), **context)
    page = _OPTION.sub(lambda found: found[0] if found[0][0] == "<" else f'<span class="whole">{found[0]}</span>', page)
    return page.encode()


def as_is(text: str) -> Markup:
    """Mark text from this package as safe, so that a template does not escape it."""
    from markupsafe import Markup

    return Markup(text)


def drawn(figure: Figure, description: str) -> Markup:
    """A figure as SVG for a template."""
    return as_is(inline_svg(figure, description))


def insight_part(insight: Insight) -> dict[str, Any]:
    """The values of the template's ``insight`` macro: accuracy by class, confusion matrix, confused pairs, confident mistakes,
    other hard samples.

    Raises:
        DatasetError: a picture cannot be read.
    """
    names = [one.name for one in insight.classes]
    mistakes = insight.confident_mistakes(_HARDEST)
    hardest = [index for index in insight.hardest(2 * _HARDEST) if index not in mistakes]
    matrix = None
    if len(names) <= MATRIX_CLASSES:
        matrix = drawn(confusion_matrix(names, insight.confusion().tolist()), "confusion matrix")

    def picture(index: int, *, captioned: bool) -> dict[str, Any]:
        true, predicted = names[int(insight.labels[index])], names[int(insight.predicted[index])]
        probability = f"{100 * float(insight.confidences[index]):.0f}\N{NO-BREAK SPACE}%"
        _, record = insight.sample(index)
        verdict = f"→ {predicted}, {probability}" if true != predicted else f"correct, {probability}"
        return {
            "src": insight.picture(index),
            "file": record.source,
            "lines": [true, verdict] if captioned else [],
            "alt": f"{record.source}: true class {true}; predicted {predicted}, {probability}",
        }

    return {
        "split": insight.split,
        "res": insight.res,
        "correct": insight.correct,
        "samples": len(insight.labels),
        "top1_percent": insight.top1_percent,
        "standard_error_percent": standard_error_percent(insight.correct, len(insight.labels)),
        "by_class": drawn(class_accuracy(names, insight.by_class()), "top-1 of each class"),
        "matrix": matrix,
        "pairs": [
            {
                "true": names[pair.true],
                "predicted": names[pair.predicted],
                "samples": pair.samples,
                "of": int((insight.labels == pair.true).sum()),
                "pictures": [picture(index, captioned=False) for index in insight.examples(pair, _PICTURES_OF_A_PAIR)],
            }
            for pair in insight.most_confused(_PAIRS)
        ],
        "mistakes": [picture(index, captioned=True) for index in mistakes],
        "hardest": [picture(index, captioned=True) for index in hardest[:_HARDEST]],
    }
