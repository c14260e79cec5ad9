"""What each field does, as a table in Markdown, made from the comments of `configs/base.py`.

python -m configs.describe > docs/config.md
"""

import re
from pathlib import Path

from configs import base

HEADER = """# Every field of a config

Made from `configs/base.py` by `python -m configs.describe > docs/config.md`. On the command line a field is
`--config.FIELD=VALUE`, for example `--config.data.labeled_patients=3`; a tuple stands in quotes,
`--config.data.patch_size='(160, 160)'`; a misspelt field is an error. The data sets'
own configs (`configs/acdc.py` and so on) change only what differs.

| field | default | what it does |
| --- | --- | --- |
"""

METHODS = """
# Every method

A method is a config: what stands behind the colon of `--config=configs/base.py:METHOD` sets these fields.

| method | sets |
| --- | --- |
"""


def fields() -> list[tuple[str, str, str]]:
    """Name, default as it is written, and comment of every field, in the order of `configs/base.py`."""
    source = Path(base.__file__).read_text(encoding="utf-8")
    found = re.findall(r"^    config\.([\w.]+) = (.+?)(?:  # (.+))?$", source, re.MULTILINE)
    return [(name, default, said) for name, default, said in found if default != "ConfigDict()"]


def page() -> str:
    """The page, as Markdown."""
    rows = [f"| `{name}` | `{default}` | {said.replace('|', 'or')} |" for name, default, said in fields()]
    methods = [
        f"| `{name}` | {', '.join(f'`{field}={value}`' for field, value in weights.items()) or 'nothing'} |"
        for name, weights in base.METHODS.items()
    ]
    return HEADER + "\n".join(rows) + "\n" + METHODS + "\n".join(methods) + "\n"


if __name__ == "__main__":
    print(page(), end="")
