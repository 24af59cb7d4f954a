"""The instructions of a LeRobot dataset: meta/tasks.jsonl, in v3.0 meta/tasks.parquet."""

import json

from lightwam_jax.data.formats import checked
from lightwam_jax.data.formats.checked import Wrong


def read(root, version):
    """Returns ({task_index: instruction}, [message about each line or row that cannot be used]).

    Raises:
      ValueError: no such file, or none of it can be used.
    """
    file = root / "meta" / ("tasks.parquet" if version == "v3.0" else "tasks.jsonl")
    found = _table(file) if version == "v3.0" else (file, checked.json_lines(file), "task")
    file, entries, column = found
    tasks, places, faults, twice = {}, {}, [], set()
    for entry in entries:
        try:
            if isinstance(entry, Wrong):
                raise entry
            index, text = entry.whole("task_index"), entry.text(column)
        except Wrong as error:
            faults.append(str(error))
            continue
        if tasks.setdefault(index, text) != text:
            twice.add(index)
            faults.append(f"{entry.place}: task_index {index} is that of {places[index]} too")
        places[index] = entry.place
    if faults and not tasks:
        raise ValueError(faults[0])
    return {index: text for index, text in tasks.items() if index not in twice}, faults


def _table(file):
    """Returns (file, rows, the column of the instructions) of meta/tasks.parquet."""
    entries, names, metadata = checked.table(file)
    # pandas wrote the instructions as its index, which does not always have a name of ours.
    try:
        index = json.loads(metadata.get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        index = []
    known = ["task", *(name for name in index if isinstance(name, str)), "__index_level_0__"]
    column = next((name for name in known if name in names and name != "task_index"), None)
    missing = [name for name in ("task_index",) if name not in names]
    missing += ["task"] if column is None else []
    if missing:
        raise Wrong(
            f"{file} lacks the column {' and '.join(missing)}; it has {', '.join(names) or 'none'}"
        )
    return file, entries, column
