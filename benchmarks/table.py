"""Write the kept results into benchmarks/README.md: `python benchmarks/table.py`."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


def main() -> None:
    lines = [
        "| what | against | ours | other | unit | ratio | target |",
        "|---|---|---|---|---|---|---|",
    ]
    places = []
    for path in sorted((FOLDER / "results").glob("*.json")):
        record = json.loads(path.read_text())
        facts = record["facts"]
        data = f", {facts['data']}" if "data" in facts else ""
        places.append(
            f"`{record['name']}`: {record['date']}, {record['cpu']}, {record['threads']} thread, "
            f"torch {record['versions']['torch']}{data}."
        )
        for row in record["rows"]:
            numbers = (
                "" if row[name] is None else f"{row[name]:.3g}" for name in ("ours", "other")
            )
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            target = f"{row['target']}: {row['verdict']}" if row["target"] else ""
            cells = (row["what"], row["other_is"], *numbers, row["unit"], ratio, target)
            lines.append(f"| {' | '.join(cells)} |")
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = "\n".join([*lines, "", *places])
    readme.write_text(f"{before}{BEGIN}\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
