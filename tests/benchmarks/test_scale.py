"""The index of a large cache, small here: opens, shuffles, resumes. The table names its sources."""

import pathlib
import re

import grain
import numpy as np
import pytest

from benchmarks import results, scale_index, scale_paper
from configs import libero
from lightwam_jax import config as config_lib
from lightwam_jax.data.caches import text as text_cache

INDEX = {"windows": 10, "episodes": 1, "instructions": 1, "plan_s": 1, "open_s": 1, "peak_gib": 1}
INDEX |= {"first_batch_s": 1, "all_shards_s": 1, "before_gib": 1, "texts_gib_if_in_memory": 1}
INDEX |= {"index_bytes_per_window": 16.0}
INDEX["long_shard"] = {"records": 1000, "by_list_us": 5.0, "by_range_us": 4.0}


@pytest.fixture(scope="module")
def config():
    return config_lib.from_config_dict(libero.get_config("spatial"))


def paper(config, index=INDEX, **wanted):
    wanted = scale_paper.Wanted(**{"hours": 100.0, "topology": "v5e:256"} | wanted)
    found = scale_paper.rows(config, wanted, index, scale_paper.Measured(1e5, 1000.0))
    return {row.what: row for row in found}


def test_a_cache_of_100_000_windows_opens_shuffles_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_index, "TEXT", (12, 16))
    monkeypatch.setattr(text_cache, "_IN_MEMORY", 0)  # texts are read from the file, one by one
    config, _ = scale_index.make(str(tmp_path), 100_000, instructions=700)
    found = scale_index.read(config, 8)  # its own assertions: the right records, resumed exactly
    assert found["resumed_exactly"] and found["rows_read"] == 8 * config.train.batch_size
    order = grain.MapDataset.range(100_000).seed(config.seed).shuffle()
    epoch = np.fromiter((order[i] for i in range(100_000)), np.int64, 100_000)
    assert found["first_rows"] == epoch[:8].tolist()
    assert np.array_equal(np.sort(epoch), np.arange(100_000))  # every window, once


def test_what_is_wrong_with_a_cache_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_index, "TEXT", (12, 16))
    config, _ = scale_index.make(str(tmp_path), 2000, instructions=3)
    original = scale_index.loader._CacheRecords.__getitem__
    monkeypatch.setattr(
        scale_index.loader._CacheRecords, "__getitem__", lambda self, row: original(self, row // 2)
    )
    with pytest.raises(AssertionError, match="another record than asked for"):
        scale_index.read(config, 2)


def test_the_ways_to_read_a_record(tmp_path):
    found = scale_index.read_ways(tmp_path / "long", 2000, reads=5)
    assert found["records"] == 2000 and found["by_list_us"] > 0 and found["by_range_us"] > 0


def test_figures_follow_from_the_hours(config):
    one, ten = paper(config), paper(config, hours=1000.0)
    assert one["windows"].value == "7.2 million" and ten["windows"].value == "72.0 million"
    tables = one["statistics of 36,000 episodes, before they are joined"]
    assert tables.value == "801.8 MB"  # 2 x 6 x 8 x (8 + 32 x 7) bytes each
    assert one["images"].value == "14.4 million"  # two cameras
    assert one["latent cache on the disk"].value == "720.0 GB"  # 1e5 bytes a window
    assert one["steps of 1 epochs"].value == "440"  # 7.2e6 / 16,384
    assert one["samples per second and host"].value == "115 at most"
    assert one["a checkpoint"].value == "5.3 GB"  # 441,031,543 values and two moments, float32
    assert one["index of the cache, per process that reads"].value == "115.2 MB"
    for row in one.values():
        named = ("json", ".py", "measured", "--", "config", "build_latents", "times", "steps", "h,")
        assert any(word in row.source for word in named) or "over the batch" in row.source, row


def test_a_topology_that_was_not_compiled_is_named(config):
    with pytest.raises(ValueError, match=r"--topology=v5e:3: no compiled step .*v5e:256"):
        paper(config, topology="v5e:3")
    assert "run it with --try_index" in paper(config, index=None)["index of the cache"].source


def test_tables_go_between_the_marks(config, tmp_path):
    page, wanted = tmp_path / "pods.md", scale_paper.Wanted(100.0, "v5e:256")
    begin, end = (f"<!-- benchmarks.scale: {place} -->\n" for place in ("begin", "end"))
    page.write_text(f"before\n{begin}old\n{end}after\n", encoding="utf-8")
    rows = list(paper(config).values())
    scale_paper.write(page, wanted, rows, INDEX)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| windows | 7.2 million | one from every step (data/windows.py) |" in text
    with pytest.raises(ValueError, match="has no index: run it with --try_index"):
        scale_paper.write(page, wanted, rows, None)
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the lines"):
        scale_paper.write(page, wanted, rows, INDEX)


def test_directory_may_be_new(tmp_path):
    assert results.made(None) is None
    place = tmp_path / "not" / "yet"
    assert results.made(str(place)) == str(place) and place.is_dir()
    sources = pathlib.Path(results.__file__).parent.glob("*.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    assert [name for name, text in texts.items() if re.search(r"dir=\w+\.directory", text)] == []
