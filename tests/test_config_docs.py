"""docs/config.md."""

import dataclasses

from lightwam_jax import config, config_docs


def test_the_page_is_current():
    assert config_docs.PAGE.read_text(encoding="utf-8") == config_docs.page(), "run make docs"


def test_a_comment_above_and_behind_a_key_are_its_meaning():
    comments = config_docs._comments(config.DataConfig)
    assert comments["text_len"] == "rows of the text embedding"
    assert (
        comments["orientation"].startswith("Per camera") and "recorded." in comments["orientation"]
    )
    assert comments["prompt_template"] == "What the text encoder reads; {task} is the instruction."
    assert set(comments) == {field.name for field in dataclasses.fields(config.DataConfig)}
