"""Formats of recordings: lerobot, hdf5 and rlds read, lerobot_write writes.

`data.episodes.read` imports the module that config.data.source names. LeRobot's meta/ is read by
lerobot_meta (info.json), lerobot_tasks and lerobot_listed (the episodes), its rows by lerobot_rows;
lerobot_checks compares them. lerobot_layouts and lerobot_stats are for writing it. Shared: checked
(metadata files, value by value), stored (an episode), keys (config.data.fields), video.
"""
