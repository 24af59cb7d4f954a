"""Values in LeRobot's meta/ that are not what they should be: named, and no end of everything."""

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightwam_jax.data import episodes
from lightwam_jax.data.formats import checked, lerobot_write
from tests import synthetic

KEY = "videos/observation.images.wrist"
CHANGED = 2  # the episode whose line or row is broken
NAME = f"episode_{CHANGED:06d}"
OTHERS = {f"episode_{i:06d}" for i in (0, 1, 3)}


def made(count=4, steps=6, widths=(8, 7)):
    """Short episodes whose pictures carry (episode, frame)."""
    rng, out = np.random.default_rng(0), []
    for number in range(count):
        images = np.full((steps, 16, 16, 3), 100, np.uint8)
        images[:, :4, : 2 * number + 2] = 220
        for step in range(steps):
            images[step, 8:, : 2 * step + 2] = 220
        out.append(
            episodes.ArrayEpisode(
                f"e{number}",
                10.0,
                synthetic.TASKS[number % 2],
                rng.standard_normal((steps, widths[0])).astype(np.float32),
                rng.uniform(-1, 1, (steps, widths[1])).astype(np.float32),
                {"scene": images, "wrist": images},
            )
        )
    return out


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("meta")
    for version in ("2.1", "3.0"):
        lerobot_write.write(made(), root / version, version, ("scene", "wrist"))
    return root


@pytest.fixture
def single(sets, tmp_path):
    return shutil.copytree(sets / "2.1", tmp_path / "set")


@pytest.fixture
def packed(sets, tmp_path):
    return shutil.copytree(sets / "3.0", tmp_path / "set")


def configure(root, **overrides):
    short = {"data.num_frames": 5, "data.frame_stride": 1, "data.action_horizon": 4}
    return synthetic.make_config("", **{"data.path": str(root)} | short | overrides)


EVERY = {NAME, *OTHERS}


def read(root, **overrides):
    """Returns ({ids of sound episodes}, [error], [warning])."""
    found, problems = episodes.read(configure(root, **overrides))
    errors = [p for p in problems if p.severity == "error"]
    return {e.id for e in found}, errors, [p for p in problems if p.severity != "error"]


def change_info(root, change):
    file = root / "meta/info.json"
    info = json.loads(file.read_text(encoding="utf-8"))
    change(info)
    file.write_text(json.dumps(info), encoding="utf-8")


def change_lines(file, change):
    """`change` gets the list of a JSON-lines file's objects."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    change(lines)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def change_column(file, name, change, kind=None):
    """`change` gets and returns the values of a parquet column."""
    table = pq.read_table(file)
    values = pa.array(change(table.column(name).to_pylist()), kind)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), file)


def episode_table(root):
    return root / "meta/episodes/chunk-000/file-000.parquet"


BAD = [None, math.nan, math.inf, "ten", "10", [10], {"is": 10}, True, -1, 0, 10**30]


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("key", ["fps", "chunks_size"])
def test_a_number_of_info_json_that_is_none(single, key, value):
    change_info(single, lambda info: info.update({key: value}))
    with pytest.raises(ValueError, match=rf"info\.json: {key} is .*; expected a .*number") as error:
        read(single)
    assert checked.shown(value) in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("features", None),
        ("features", ["action"]),
        ("data_path", None),
        ("data_path", 3),
        ("data_path", ""),
        ("data_path", "/elsewhere/{episode_index}.parquet"),
        ("data_path", "../{episode_index}.parquet"),
        ("data_path", "data/{chunk_index}.parquet"),  # of v3.0
        ("data_path", "data/{episode_index"),
        ("data_path", "data/{episode_index:s}.parquet"),
        ("data_path", "data/{0}.parquet"),
        ("video_path", None),
        ("video_path", "videos/{file_index}.mp4"),
    ],
    ids=str,
)
def test_a_text_of_info_json_that_is_none(single, key, value):
    change_info(single, lambda info: info.update({key: value}))
    with pytest.raises(ValueError, match=rf"info\.json: {key} is .*; expected"):
        read(single)


@pytest.mark.parametrize("key", ["fps", "features", "data_path", "video_path", "chunks_size"])
def test_a_key_that_info_json_lacks(single, key):
    change_info(single, lambda info: info.pop(key))
    with pytest.raises(
        ValueError, match=rf"info\.json lacks {key} \(.*\); it has codebase_version"
    ):
        read(single)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"v2.1"', "[" * 10**5, "\udce4", ""])
def test_info_json_that_is_no_object(single, content):
    (single / "meta/info.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"info\.json (is|cannot be read)"):
        read(single)


@pytest.mark.parametrize("feature", ["action", "observation.state"])
@pytest.mark.parametrize("described", [None, 3, {}, {"dtype": None}, {"dtype": 5}], ids=repr)
def test_a_feature_in_use_has_a_type(single, feature, described):
    change_info(single, lambda info: info["features"].update({feature: described}))
    with pytest.raises(ValueError, match=rf"info\.json.*{feature}"):
        read(single)


@pytest.mark.parametrize(
    "changes",
    [
        {"total_episodes": None, "total_frames": None, "total_tasks": None},
        {"total_episodes": "4", "total_frames": math.nan, "splits": None},
        {"note": {"shape": [1], "names": None}},
        {"note": {"dtype": "string"}, "more": None, "most": 7},
        {"note": {"dtype": "video", "info": None, "video_info": 3, "shape": "wide"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("version", ["2.1", "3.0"])
def test_what_does_not_matter_stops_nothing(sets, tmp_path, version, changes):
    root = shutil.copytree(sets / version, tmp_path / "set")

    def change(info):
        totals = {k: v for k, v in changes.items() if k in info}
        info.update(totals)
        info["features"].update({k: v for k, v in changes.items() if k not in totals})

    change_info(root, change)
    assert read(root) == ({NAME, *OTHERS}, [], [])


@pytest.mark.parametrize("value", [*BAD[:-2], 0.5, "absent"], ids=repr)
@pytest.mark.parametrize("key", ["episode_index", "length"])
def test_a_broken_line_is_a_broken_episode(single, key, value):
    file = single / "meta/episodes.jsonl"

    def change(lines):
        lines[CHANGED].pop(key) if value == "absent" else lines[CHANGED].update({key: value})

    change_lines(file, change)
    sound, (error,), warnings = read(single)
    assert sound == OTHERS and not warnings
    assert (error.kind, error.episode) == ("broken metadata", NAME)
    assert f"episodes.jsonl, line {CHANGED + 1}" in error.message and key in error.message
    assert read(single, **{"data.exclude": (NAME,)}) == (OTHERS, [], [])


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"episode_index": 2,'])
def test_a_line_that_is_no_object_is_a_broken_episode(single, line):
    file = single / "meta/episodes.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[CHANGED] = line
    file.write_text("\n".join(lines), encoding="utf-8")
    sound, (error,), _ = read(single)
    assert sound == OTHERS and error.episode == NAME
    assert "episodes.jsonl, line 3" in error.message and "object" in error.message
    assert read(single, **{"data.exclude": (NAME,)})[0] == OTHERS


def test_an_episode_listed_twice(single):
    change_lines(single / "meta/episodes.jsonl", lambda lines: lines[3].update(episode_index=1))
    sound, errors, _ = read(single)
    assert sound == {"episode_000000", "episode_000001", "episode_000002"}
    assert {(e.kind, e.episode) for e in errors} == {
        ("duplicate id", "episode_000001"),
        ("unlisted episode", "episode_000003"),
    }
    assert "line 4 lists the episode that" in errors[0].message and "line 2" in errors[0].message


@pytest.mark.parametrize("value", [None, math.nan, 0.5, -1.0, 1e30], ids=repr)
@pytest.mark.parametrize(
    "key",
    [
        *("episode_index", "length", "data/chunk_index", "data/file_index"),
        *(f"{KEY}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")),
        f"{KEY}/to_timestamp",
    ],
)
def test_a_broken_row_is_a_broken_episode(packed, key, value):
    if key.endswith("timestamp") and value in (0.5, -1.0):
        value = math.inf  # those two are numbers
    change = lambda values: [float(v) if i != CHANGED else value for i, v in enumerate(values)]
    change_column(episode_table(packed), key, change, pa.float64())
    sound, (error,), warnings = read(packed)
    assert sound == OTHERS and not warnings and error.episode == NAME
    assert f"file-000.parquet, row {CHANGED}" in error.message and key in error.message
    missing = value is None or math.isnan(value)
    video = key.startswith("videos")
    assert error.kind == ("missing video" if missing and video else "broken metadata")
    assert "was never encoded" in error.message or checked.shown(value) in error.message
    assert read(packed, **{"data.exclude": (NAME,)}) == (OTHERS, [], [])
    if video:  # nobody asks for that camera
        assert read(packed, **{"data.cameras": ("scene",)}) == ({NAME, *OTHERS}, [], [])


def test_whole_numbers_are_whole_numbers_whatever_their_type(packed):
    table = episode_table(packed)
    names = pq.read_schema(table).names
    for name in names:
        if name.endswith(("_index", "length")) and not name.startswith(("stats", "meta")):
            change_column(table, name, lambda values: list(map(float, values)), pa.float64())
    change_column(packed / "meta/tasks.parquet", "task_index", lambda v: [*map(float, v)])
    assert read(packed) == ({NAME, *OTHERS}, [], [])


@pytest.mark.parametrize(
    "file, says",
    [
        ("meta/episodes/chunk-000/file-000.parquet", "the text '2'"),
        ("meta/tasks.parquet", "task_index is the text '0'"),
    ],
)
def test_numbers_kept_as_text(packed, file, says):
    key = "task_index" if "tasks" in file else "data/file_index"
    change_column(packed / file, key, lambda values: [f"{v:d}" for v in range(len(values))])
    with pytest.raises(ValueError, match=says):
        episodes.load_episodes(configure(packed))


def test_a_table_among_several_that_cannot_be_read(packed):
    table = pq.read_table(episode_table(packed))
    pq.write_table(table.slice(0, 3), episode_table(packed))
    other = episode_table(packed).with_name("file-001.parquet")
    pq.write_table(table.slice(3), other)
    assert read(packed) == ({NAME, *OTHERS}, [], [])
    other.write_bytes(other.read_bytes()[:50])
    sound, (error,), (warning,) = read(packed)
    assert len(sound) == 3 and (error.kind, error.episode) == ("unlisted episode", "episode_000003")
    assert "file-001.parquet cannot be read" in warning.message
    assert read(packed, **{"data.exclude": ("episode_000003",)})[1] == []


@pytest.mark.parametrize("value", [None, math.nan, 3, "", ["lift"], "absent"], ids=repr)
def test_an_instruction_that_is_no_text(single, value):
    """Only the episodes that use it are broken."""
    change = lambda lines: (
        lines[1].pop("task") if value == "absent" else lines[1].update(task=value)
    )
    change_lines(single / "meta/tasks.jsonl", change)
    sound, errors, (warning,) = read(single)
    assert sound == {"episode_000000", "episode_000002"}
    assert [(e.kind, e.episode) for e in errors] == [
        ("unknown task", "episode_000001"),
        ("unknown task", "episode_000003"),
    ]
    for problem in (*errors, warning):
        assert "tasks.jsonl, line 2" in problem.message and "task" in problem.message
    sound, errors, _ = read(single, **{"data.exclude": tuple(e.episode for e in errors)})
    assert len(sound) == 2 and not errors


@pytest.mark.parametrize("value", [None, math.nan, "0", 0.5, -1, True], ids=repr)
def test_a_number_of_an_instruction_that_is_none(single, value):
    change_lines(single / "meta/tasks.jsonl", lambda lines: lines[0].update(task_index=value))
    sound, errors, (warning,) = read(single)
    assert sound == {"episode_000001", "episode_000003"} and len(errors) == 2
    assert "tasks.jsonl, line 1: task_index is" in warning.message


def test_two_instructions_of_one_number(single):
    change_lines(single / "meta/tasks.jsonl", lambda lines: lines[1].update(task_index=0))
    sound, errors, (warning,) = read(single)
    assert not sound and len(errors) == 4
    assert "line 2: task_index 0 is that of " in warning.message and "line 1" in warning.message


def test_json_lines_edited_by_hand(single):
    file = single / "meta/tasks.jsonl"
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n") + b"\r\n")
    assert read(single) == ({NAME, *OTHERS}, [], [])
    lines = [json.loads(line) for line in content.decode().split("\n") if line]
    file.write_text("\n".join(json.dumps(line, indent=2) for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tasks\.jsonl, line 1 .*one JSON object per line"):
        read(single)
    file.write_bytes("d\u00e9placer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"tasks\.jsonl cannot be read as UTF-8"):
        read(single)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e"])
def test_only_a_line_feed_ends_a_line(single, separator):
    text = f"lift{separator}it"
    file = single / "meta/tasks.jsonl"
    raw = json.dumps({"task_index": 1, "task": text}, ensure_ascii=False)
    first = file.read_text(encoding="utf-8").split("\n")[0]
    file.write_text(f"{first}\n{raw}\n", encoding="utf-8")
    change_lines(single / "meta/episodes.jsonl", lambda lines: [x.pop("tasks") for x in lines])
    found, problems = episodes.read(configure(single))
    assert not problems and found[1].task == text


@pytest.mark.parametrize(
    "names, says",
    [
        (["task_index", "instruction"], "lacks the column task; it has task_index, instruction"),
        (["number", "task"], "lacks the column task_index; it has number, task"),
        (["task_index"], "lacks the column task; it has task_index"),
        ([], "lacks the column task_index and task"),
    ],
)
def test_columns_of_tasks_parquet(packed, names, says):
    file = packed / "meta/tasks.parquet"
    table = pq.read_table(file).replace_schema_metadata(None)
    pq.write_table(table.select(range(len(names))).rename_columns(names), file)
    with pytest.raises(ValueError, match=rf"tasks\.parquet {says}"):
        read(packed)


@pytest.mark.parametrize("name", ["instruction", "__index_level_0__"])
@pytest.mark.parametrize("told", [True, False])
def test_the_index_that_pandas_wrote_holds_the_instructions(packed, name, told):
    """pandas keeps the name of its index in the metadata; one without a name is level 0."""
    file = packed / "meta/tasks.parquet"
    metadata = {"pandas": json.dumps({"index_columns": [name]})} if told else None
    table = pq.read_table(file).rename_columns(["task_index", name])
    pq.write_table(table.replace_schema_metadata(metadata), file)
    if told or name == "__index_level_0__":
        assert read(packed) == ({NAME, *OTHERS}, [], [])
    else:
        with pytest.raises(ValueError, match="lacks the column task"):
            read(packed)
